"""Options that several subcommands share, each declared once with its default, and what they become.

A command takes them as one parameter, `loading: Loading`; `spread` puts the fields in its place for typer to read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hetero_attn.cli.shell.collector import collector_at_rest

if TYPE_CHECKING:
    from hetero_attn import LLM
    from hetero_attn.planning.options import LoadOptions

Model = Annotated[
    str, typer.Argument(help="Folder of a Hugging Face checkpoint, a GGUF file, or a hub id.", show_default=False)
]
Gguf = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Which GGUF file of a folder or repository, such as Q4_K_M or '*Q8_0*'."),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder, file or hub id whose tokenizer goes before the model's own.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads of the CPU lane. Default: one per physical core.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Makes sampling repeatable; -1 draws a fresh one.", callback=lambda seed: None if seed == -1 else seed
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer shall see it: each parameter that is a dataclass of options replaced by that one's fields.

    Such a parameter is keyword-only in the command; its fields keep their order, types and defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    shared: dict[str, Any] = {
        name: given.annotation for name, given in signature.parameters.items() if is_dataclass(given.annotation)
    }

    def spread_command(**values: Any) -> None:
        for name, group in shared.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, given in signature.parameters.items():
        parameters += _parameters(shared[name]) if name in shared else [given.replace(kind=given.KEYWORD_ONLY)]
    spread_command.__name__, spread_command.__doc__ = command.__name__, command.__doc__
    spread_command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {given.name: given.annotation for given in parameters}
    return spread_command


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


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


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is to be loaded."""

    gguf: Gguf = None
    tokenizer: Tokenizer = None
    policy: Annotated[str, typer.Option(help="auto, the name of a shipped policy, or a policy file.")] = "auto"
    gpu_memory: Annotated[
        str | None, typer.Option(help="Budget of GPU memory, such as 8GiB. Default: what is free.")
    ] = None
    gpu_layers: Annotated[
        int | None, typer.Option("-ngl", "--gpu-layers", "--n-gpu-layers", hidden=True, callback=refuse_layers)
    ] = None
    dtype: Annotated[
        str, typer.Option(metavar="auto|bf16|fp16|fp32|q8|q4_m|q4", help="Weights in memory; q8, q4_m and q4 quantise.")
    ] = "auto"
    kv_dtype: Annotated[
        str,
        typer.Option(metavar="auto|bf16|fp32|q8|q4", help="Keys and values in memory; auto: bf16 or the model's fp32."),
    ] = "auto"
    device: Annotated[
        str, typer.Option(metavar="auto|cuda|cuda:N|cpu|emulated", help="emulated is no GPU: for tests.")
    ] = "auto"
    context: Annotated[
        int | None,
        typer.Option(
            "--context", "-c", "--ctx-size", help="Most tokens of a sequence. Default: the model's own, at most 8192."
        ),
    ] = None
    batch: Annotated[int | None, typer.Option("--batch", "-np", "--parallel", help="Sequences decoded together.")] = (
        None
    )
    threads: Threads = None

    def arguments(self) -> dict[str, Any]:
        """The wishes by the names that `LLM` and `LoadOptions` give them."""
        return {
            "file": self.gguf,
            "tokenizer": self.tokenizer,
            "policy": self.policy,
            "gpu_memory": self.gpu_memory,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "device": self.device,
            "max_context": self.context,
            "max_batch": self.batch,
            "num_threads": self.threads,
        }

    def options(self, model: str, **more: Any) -> LoadOptions:
        """The wishes for who only plans, with more arguments of `LoadOptions`. Raises what that raises."""
        from hetero_attn.planning.options import LoadOptions

        return LoadOptions(model=model, **self.arguments() | more)

    def llm(self, model: str, **more: Any) -> LLM:
        """Load a model, with more arguments of `LLM`; says on stderr what takes time. Raises what `LLM` raises."""
        with collector_at_rest():
            # Before torch, whose C code takes a Ctrl-C inside this import for a numpy that is missing, and goes on.
            import_module("numpy")
            from hetero_attn import LLM

            return LLM(model, progress=True, **self.arguments() | more)


# What is not given is as the model's generation_config.json suggests, else temperature 0.7 and top-p 0.95.
_SUGGESTED = "Default: as the model suggests, else"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are to be chosen, and when an answer ends; the fields have the names of `SamplingParams`."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            help="Most tokens to generate; -1, the default: to the end of the context.",
            callback=checked_max_tokens,
            show_default=False,
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help=f"0 always takes the likeliest token. {_SUGGESTED} 0.7.", show_default=False)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Keep the likeliest tokens up to this probability. {_SUGGESTED} 0.95.", show_default=False),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help=f"Keep this many tokens. {_SUGGESTED} 0, all.", show_default=False)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help=f"Keep tokens at least this likely beside the likeliest. {_SUGGESTED} 0.", show_default=False
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help=f"Above 1 discourages tokens that were there before. {_SUGGESTED} 1.", show_default=False),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")] = (
        None
    )

    def wishes(self, ignore_eos: bool = False) -> dict[str, Any]:
        """The given ones, for `LLM.default_params`. Raises SamplingError for a value out of range."""
        from hetero_attn import SamplingParams

        wishes = asdict(self) | {"stop": tuple(self.stop or ()) or None, "ignore_eos": ignore_eos or None}
        given: dict[str, Any] = {name: value for name, value in wishes.items() if value is not None}
        SamplingParams(**given)  # before a model is loaded for them
        return given


Speculate = Annotated[
    str | None,
    typer.Option(
        help="off | ngram | auto: compute tokens ahead that came before in prompt or answer, as far as that pays; or a "
        "small model of the same vocabulary, or an EAGLE-3 head, which guesses them. The answer stays the same. "
        "Default: as the policy says, else off.",
        show_default=False,
    ),
]
