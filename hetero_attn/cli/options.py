"""Options that several subcommands share, and how they become an `LLM` and its `SamplingParams`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hetero_attn import LLM, SamplingParams

Model = Annotated[str, typer.Argument(help="Directory of a Hugging Face checkpoint, or a hub id.", show_default=False)]
Policy = Annotated[str, typer.Option(help="auto, the name of a shipped policy, or a policy file.")]
GpuMemory = Annotated[str | None, typer.Option(help="Budget of GPU memory, such as 8GiB. Default: what is free.")]
Dtype = Annotated[str, typer.Option(metavar="auto|bf16|fp32|q8|q4", help="Weights in memory; q8 and q4 quantise.")]
KvDtype = Annotated[
    str, typer.Option(metavar="auto|bf16|fp32|q8|q4", help="Keys and values in memory; auto: bf16 or the model's fp32.")
]
Device = Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|cpu|emulated", help="emulated is no GPU: for tests.")]
Context = Annotated[int | None, typer.Option(help="Most tokens of a sequence. Default: the model's own.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU lane. Default: one per physical core.")]
Seed = Annotated[int, typer.Option(help="Makes sampling repeatable.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely beside the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages tokens that were there before.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def load_llm(
    model: str,
    policy: str,
    gpu_memory: str | None,
    dtype: str,
    device: str,
    context: int | None,
    threads: int | None,
    seed: int = 0,
    kv_dtype: str = "auto",
) -> LLM:
    """Load a model by the shared options; shows progress only to a person. Raises what `LLM` raises."""
    from hetero_attn import LLM

    return LLM(
        model, policy=policy, gpu_memory=gpu_memory, dtype=dtype, device=device, max_context=context, seed=seed,
        num_threads=threads, kv_dtype=kv_dtype, progress=sys.stderr.isatty(),
    )


def sampling_params(
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: list[str] | None,
    ignore_eos: bool = False,
) -> SamplingParams:
    """Build `SamplingParams` from the shared options. Raises SamplingError for a value out of range."""
    from hetero_attn import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop or (), ignore_eos=ignore_eos,
    )
