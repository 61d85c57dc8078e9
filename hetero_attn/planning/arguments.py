"""The arguments of `LLM` and `plan_model`, checked where they enter: type and range of each, whatever else is wished.

Integers may be numpy's. What is wrong is a ArgumentError that names the argument, the value and the rule.
"""

from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from hetero_attn.errors import ArgumentError, nearest
from hetero_attn.lanes.handover_names import HANDOVERS
from placement import HardwareProfile, Policy
from placement.machine.ranges import MOST_CORES
from placement.plan.units import parse_bytes
from placement.policy.fields import SPECULATIONS, names_model

# name -> (least, most): far above what a machine has, far below what would take its memory for tables alone.
INTEGERS = {
    "max_context": (1, 1 << 25),
    "max_batch": (1, 1 << 16),
    "num_threads": (1, MOST_CORES),
    "page_size": (1, 1 << 16),
    "kv_tokens": (1, 1 << 40),
    "seed": (0, 2**63 - 1),
    "max_waiting": (1, 1 << 30),
}
TORCH_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
FLAGS = ("elastic", "prefix_cache", "overlap", "progress")
MOST_BYTES = 1 << 60  # of GPU memory; what is far beyond any machine overflows a planner that divides


def checked_arguments(**values: Any) -> dict[str, Any]:
    """The same arguments as plain values: integers as int, a torch.device and torch.dtype as text.

    Raises ArgumentError, also for a name that is none of the known ones.
    """
    return {name: _checked(name, value) for name, value in values.items()}


def _checked(name: str, value: Any) -> Any:
    if name in INTEGERS:
        return _integer(name, value)
    if name in FLAGS:
        _expect(isinstance(value, bool), name, value, "True or False")
    elif name == "needs_text":
        _expect(isinstance(value, bool) or callable(value), name, value, "True, False or a function that refuses more")
    elif name == "gpu_memory":
        return None if value is None else _size(value)
    elif name == "device":
        value = str(value) if type(value).__module__ == "torch" and type(value).__name__ == "device" else value
        _expect(isinstance(value, str), name, value, "a name such as 'cpu' or 'cuda:0'")
    elif name in ("dtype", "kv_dtype"):
        value = TORCH_DTYPES.get(str(value), value)
        _expect(isinstance(value, str), name, value, "a name such as 'auto', 'bf16' or 'q4'")
    elif name == "handover":
        _expect(isinstance(value, str), name, value, "a name")
        check_choice(name, value, HANDOVERS)
    elif name == "speculate":
        if value is None:
            return None
        _expect(isinstance(value, str | Path), name, value, "a name, or a model's directory, file or hub id")
        value = str(value)
        if not names_model(value):
            check_choice(name, value, (*SPECULATIONS, "the directory, file or hub id of a model"))
    elif name == "model":
        _expect(isinstance(value, str | Path), name, value, "a directory or a hub id")
    elif name == "file":
        _expect(value is None or isinstance(value, str), name, value, "the name of a GGUF file, wildcards allowed")
    elif name == "tokenizer":
        _expect(value is None or isinstance(value, str | Path), name, value, "a folder, a file or a hub id")
    elif name == "policy":
        _expect(isinstance(value, str | Path | Policy), name, value, "a policy's name, its file or a Policy")
    elif name == "hardware":
        right = value is None or isinstance(value, str | HardwareProfile)
        _expect(right, name, value, "None, a machine's name or a HardwareProfile")
        if isinstance(value, str):
            _check_machine(value)
    return value


def _integer(name: str, value: Any) -> int | None:
    if value is None and name != "page_size":
        return None
    least, most = INTEGERS[name]
    if isinstance(value, Integral) and not isinstance(value, bool) and value < least:
        raise ArgumentError(f"{name} is {value}; it must be at least {least}")
    right = isinstance(value, Integral) and not isinstance(value, bool) and value <= most
    _expect(right, name, value, f"an integer from {least} to {most}")
    return int(value)


def _size(value: Any) -> int | str:
    value = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise ArgumentError(f"gpu_memory: {error}") from None
    if size > MOST_BYTES:
        raise ArgumentError(f"gpu_memory is {value!r:.80}; no machine has so much, write bytes or text such as 6GiB")
    return value


def _check_machine(name: str) -> None:
    try:
        HardwareProfile.named(name)
    except ValueError as error:
        raise ArgumentError(f"hardware: {error}") from None


def _expect(is_right: bool, name: str, value: Any, expected: str) -> None:
    if not is_right:
        raise ArgumentError(f"{name} is {value!r:.80}; it must be {expected}")


# What others call a choice, where its spelling is nearer to another one.
OTHER_NAMES = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "q8_0": "q8",
    "int8": "q8",
    "q4_0": "q4",
    "int4": "q4",
    "q4_k_m": "q4_m",
}


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ArgumentError, with the nearest known name, where `value` is none of them."""
    known = tuple(known)
    if value not in known:
        meant = OTHER_NAMES.get(str(value).lower())
        hint = f" (did you mean {meant!r}?)" if meant in known else nearest(value, known)
        raise ArgumentError(f"{name} is {value!r}; it must be one of {', '.join(known)}{hint}")
