"""`hetero-attn generate`: one prompt in, text out as it is made, then the speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.errors import INTERRUPTED
from hetero_attn.cli.output import finished, output_dict, print_json, print_stream, read_text, remark, speed_line
from hetero_attn.cli.talk.first_words import FirstWords


@options.spread
def generate(
    model: options.Model,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads it from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Take the prompt from a file; - is stdin.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: apply the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat, the system message before it.")] = None,
    sampling: options.Sampling,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    seed: options.Seed = 0,
    loading: options.Loading,
    speculate: options.Speculate = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, or answer it (--chat), printing the text as it is made; the speed goes to stderr."""
    text = prompt_text(prompt, file)
    if system is not None and not chat:
        raise typer.BadParameter("--system belongs to a chat template; add --chat")
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = [*opening, {"role": "user", "content": text}]
    first = FirstWords(sampling.wishes(ignore_eos), messages if chat else text)
    with loading.llm(model, seed=seed, needs_text=first, speculate=speculate) as llm:
        pieces = llm.stream(first.token_ids, first.params)
        if as_json:
            output = finished(pieces)
            print_json(output_dict(output))
        else:
            _, output = print_stream(pieces)
            if output is not None:
                remark(speed_line(output.metrics))
    if output is None or output.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from one of its two places; raises typer.BadParameter."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the prompt by --prompt TEXT or by --file FILE, one of the two")
    if file is not None:
        return read_text(file)
    return read_text(Path("-")) if prompt == "-" else prompt
