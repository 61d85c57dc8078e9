"""`hetero-attn chat`: a conversation in the terminal. Ctrl-C ends an answer, /exit ends the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_stream, speed_line

if TYPE_CHECKING:
    from hetero_attn import LLM, SamplingParams

HELP = "/exit leaves, /reset forgets the conversation, /help prints this; Ctrl-C ends an answer"
PROMPT = "> "


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    policy: options.Policy = "auto",
    gpu_memory: options.GpuMemory = None,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    device: options.Device = "auto",
    context: options.Context = None,
    threads: options.Threads = None,
) -> None:
    """Talk with a model; Ctrl-C ends an answer, /exit ends the program."""
    params = options.sampling_params(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop)
    with options.load_llm(model, policy, gpu_memory, dtype, device, context, threads, seed, kv_dtype=kv_dtype) as llm:
        typer.echo(HELP, err=True)
        converse(llm, params, system)


def converse(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Read lines and print answers until /exit or the end of the input."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            messages = answer(llm, params, [*messages, {"role": "user", "content": line}])


def read_line() -> str | None:
    """One line from the person, stripped; empty after Ctrl-C, None at the end of the input."""
    try:
        return input(PROMPT).strip()
    except KeyboardInterrupt:
        typer.echo(f"\n{HELP}", err=True)
        return ""
    except EOFError:
        return None


def answer(llm: LLM, params: SamplingParams, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Stream the answer to the last message; returns the conversation with it, as far as it got."""
    text, last = print_stream(llm.stream_chat(messages, params))
    if last is not None:
        typer.echo(speed_line(last.metrics), err=True)
    # A chat template may refuse two user messages in a row, so an answer that was cut before its first word takes its
    # question along.
    return [*messages, {"role": "assistant", "content": text}] if text else messages[:-1]
