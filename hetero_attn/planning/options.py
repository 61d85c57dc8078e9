"""Every wish with which a model is loaded, once: `LLM`, `plan_model`, the commands and the profiler all make one."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from hetero_attn.planning.arguments import checked_arguments
from placement import HardwareProfile, Policy

PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a user may say about a load; the fields are the arguments of `LLM`, where they are described.

    None and "auto" leave a choice to the policy, else to the model and the machine: `settle` makes all of them. Types
    and
    ranges are checked here: raises ArgumentError, also for a name that is none of the known ones.
    """

    model: str | Path
    policy: str | Path | Policy = "auto"
    gpu_memory: str | int | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    max_batch: int | None = None
    num_threads: int | None = None
    hardware: HardwareProfile | str | None = None
    page_size: int = PAGE_TOKENS
    elastic: bool = False
    kv_tokens: int | None = None
    kv_dtype: str = "auto"
    file: str | None = None
    tokenizer: str | Path | None = None
    seed: int | None = 0
    prefix_cache: bool = True
    overlap: bool = True
    handover: str = "auto"
    progress: bool = True
    max_waiting: int | None = None
    needs_text: bool | Callable[..., object] = False
    speculate: str | Path | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in checked_arguments(**given).items():
            object.__setattr__(self, name, value)

    @property
    def asks_for_this_machine(self) -> bool:
        """Whether the kept profile of this machine decides: no other machine was named, and no emulated one."""
        return self.hardware is None and self.device != "emulated"
