"""`hetero-attn generate`: one prompt in, text out as it is made, then the speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetero_attn.cli import options
from hetero_attn.cli.errors import INTERRUPTED
from hetero_attn.cli.output import finished, output_dict, print_json, print_stream, read_text, speed_line

if TYPE_CHECKING:
    from hetero_attn.planning.settle import PlannedModel
    from hetero_attn.serving.text.tokenizer import Tokenizer


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
    wishes = sampling.wishes(ignore_eos)
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = [*opening, {"role": "user", "content": text}]
    refuses = refusing(messages if chat else text, wishes)
    with loading.llm(model, seed=seed, needs_text=refuses, speculate=speculate) as llm:
        params = llm.default_params(**wishes)
        pieces = llm.stream_chat(messages, params) if chat else llm.stream(text, params)
        if as_json:
            output = finished(pieces)
            print_json(output_dict(output))
        else:
            _, output = print_stream(pieces)
            if output is not None:
                typer.echo(speed_line(output.metrics), err=True)
    if output is None or output.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)


def refusing(prompt: str | list[dict[str, str]], wishes: dict[str, Any]) -> Callable[..., None]:
    """Refuses a prompt or messages that cannot be answered with what the model suggests for the rest of the wishes,
    while its weights are loaded: `needs_text` of `LLM`."""

    def refuses(tokenizer: Tokenizer, planned: PlannedModel) -> None:
        # Imported with the model by now, with the collector at rest.
        from hetero_attn.serving.defaults import default_params
        from hetero_attn.serving.text.first_words import expect_answerable

        default_params(planned.path, **wishes)
        expect_answerable(prompt, tokenizer, planned)

    return refuses


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from one of its two places; raises typer.BadParameter."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the prompt by --prompt TEXT or by --file FILE, one of the two")
    if file is not None:
        return read_text(file)
    return read_text(Path("-")) if prompt == "-" else prompt
