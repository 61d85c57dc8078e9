"""Options that several subcommands share, and how they become an `LLM` and its `SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetero_attn.cli.shell.collector import collector_at_rest

if TYPE_CHECKING:
    from hetero_attn import LLM

Model = Annotated[
    str, typer.Argument(help="Folder of a Hugging Face checkpoint, a GGUF file, or a hub id.", show_default=False)
]
Policy = Annotated[str, typer.Option(help="auto, the name of a shipped policy, or a policy file.")]
GpuMemory = Annotated[str | None, typer.Option(help="Budget of GPU memory, such as 8GiB. Default: what is free.")]
Dtype = Annotated[
    str, typer.Option(metavar="auto|bf16|fp32|q8|q4_m|q4", help="Weights in memory; q8, q4_m and q4 quantise.")
]
KvDtype = Annotated[
    str, typer.Option(metavar="auto|bf16|fp32|q8|q4", help="Keys and values in memory; auto: bf16 or the model's fp32.")
]
Device = Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|cpu|emulated", help="emulated is no GPU: for tests.")]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", "-c", "--ctx-size", help="Most tokens of a sequence. Default: the model's own, at most 8192."
    ),
]
Batch = Annotated[int | None, typer.Option("--batch", "-np", "--parallel", help="Sequences decoded together.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads of the CPU lane. Default: one per physical core.")
]
Seed = Annotated[int, typer.Option(help="Makes sampling repeatable.")]


def refuse_layers(layers: int | None) -> None:
    """Say what stands in the place of llama.cpp's -ngl; raises typer.BadParameter where it was given."""
    if layers is not None:
        raise typer.BadParameter(
            "there is no number of layers to offload: every layer is split over GPU and CPU, and a plan decides how. "
            "Give the GPU memory that may be used, --gpu-memory 8GiB; for no layers --device cpu, for all --policy "
            "gpu_only"
        )


def checked_max_tokens(tokens: int | None) -> int | None:
    """-1 as None, on to the end of the context; raises typer.BadParameter for other numbers below 1."""
    if tokens is not None and tokens != -1 and tokens < 1:
        raise typer.BadParameter(
            f"{tokens} is no number of tokens; give at least 1, or -1 to go on to the end of the context"
        )
    return None if tokens == -1 else tokens


GpuLayers = Annotated[
    int | None, typer.Option("-ngl", "--gpu-layers", "--n-gpu-layers", hidden=True, callback=refuse_layers)
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        help="Most tokens to generate; -1, the default: to the end of the context.",
        callback=checked_max_tokens,
        show_default=False,
    ),
]
# What is not given is as the model's generation_config.json suggests, else temperature 0.7 and top-p 0.95.
_SUGGESTED = "Default: as the model suggests, else"
Temperature = Annotated[
    float | None, typer.Option(help=f"0 always takes the likeliest token. {_SUGGESTED} 0.7.", show_default=False)
]
TopP = Annotated[
    float | None,
    typer.Option(help=f"Keep the likeliest tokens up to this probability. {_SUGGESTED} 0.95.", show_default=False),
]
TopK = Annotated[int | None, typer.Option(help=f"Keep this many tokens. {_SUGGESTED} 0, all.", show_default=False)]
MinP = Annotated[
    float | None,
    typer.Option(help=f"Keep tokens at least this likely beside the likeliest. {_SUGGESTED} 0.", show_default=False),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help=f"Above 1 discourages tokens that were there before. {_SUGGESTED} 1.", show_default=False),
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Speculate = Annotated[
    str,
    typer.Option(
        help="off | ngram | auto: compute tokens ahead that came before in prompt or answer, as far as that pays; the "
        "answer stays the same."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def load_llm(
    model: str,
    policy: str,
    gpu_memory: str | None,
    dtype: str,
    device: str,
    context: int | None,
    threads: int | None,
    seed: int | None = 0,
    kv_dtype: str = "auto",
    batch: int | None = None,
    needs_text: bool = False,
    speculate: str = "off",
    needs_template: bool = False,
) -> LLM:
    """Load a model by the shared options; says on stderr what takes time. Raises what `LLM` raises.

    needs_template: a chat template will be filled in; what that takes is imported while the weights load.
    """
    with collector_at_rest():
        from hetero_attn import LLM

        if needs_template:
            from hetero_attn.serving.tokenizer import import_beside

            import_beside()

        return LLM(
            model,
            policy=policy,
            gpu_memory=gpu_memory,
            dtype=dtype,
            device=device,
            max_context=context,
            seed=seed,
            num_threads=threads,
            kv_dtype=kv_dtype,
            max_batch=batch,
            progress=True,
            needs_text=needs_text,
            speculate=speculate,
        )


def sampling_wishes(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    ignore_eos: bool = False,
) -> dict[str, Any]:
    """The given ones of the shared options, for `LLM.default_params`. Raises SamplingError for a value out of range."""
    from hetero_attn import SamplingParams

    wishes = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()) or None,
        "ignore_eos": ignore_eos or None,
    }
    given: dict[str, Any] = {name: value for name, value in wishes.items() if value is not None}
    SamplingParams(**given)  # before a model is loaded for them
    return given
