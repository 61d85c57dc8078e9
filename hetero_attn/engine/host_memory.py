"""Is there host memory for a plan, asked before anything is loaded; and what runs out all the same, memory or room for
temporary files, has one name.

Without a look before, a model that is too large ends in the kernel's out-of-memory killer after minutes of loading.
"""

import errno
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cpu_kernels.team.cgroups import free_memory_bytes
from hetero_attn.errors import HeteroError, MemoryBudgetError
from placement.plan.plan import Plan
from placement.plan.units import format_bytes

# How torch and Python say that there is no memory, in errors that have no type of their own.
NO_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
WAY_OUT = "use a smaller dtype, max_context or max_batch, fewer threads, or free some memory"


def why_too_large(*plans: Plan, root: Path = Path("/")) -> str:
    """Why a plan, or several that are to be loaded together, do not fit in the host memory that is free now, in plain
    words; empty where they do.

    Weights are written at once and must fit; a cache is only reserved and fills with use, so it counts against a limit
    of address space alone. An emulated GPU's memory is host memory.
    """
    written, total = sum(map(_written_bytes, plans)), sum(map(_reserved_bytes, plans))
    free, space = free_host_bytes(root), free_address_space()
    whose, needs = ("its", "it needs") if len(plans) == 1 else ("their", "they need")
    if written > free:
        return f"{whose} weights need {format_bytes(written)} of host memory, and {format_bytes(free)} are free"
    if space is not None and total > space:
        room = format_bytes(space)
        return f"{needs} {format_bytes(total)} of address space, and the limit of this process leaves {room}"
    return ""


def expect_room(*plans: Plan) -> None:
    """Raise MemoryBudgetError where host memory does not hold all of these plans, which are to be loaded together."""
    if reason := why_too_large(*plans):
        raise MemoryBudgetError(f"{' with the drafter '.join(plan.model for plan in plans)}: {reason}; {WAY_OUT}")


def _written_bytes(plan: Plan) -> int:
    """Host memory that loading a plan writes."""
    on_gpu = plan.memory.gpu.get("weights", 0) if plan.device == "cuda" else 0
    return plan.workload.embed_bytes + plan.workload.weight_bytes - on_gpu


def _reserved_bytes(plan: Plan) -> int:
    """Host memory that loading a plan takes of the address space, what drafts for it apart."""
    memory = plan.memory
    places = (memory.host, memory.pinned, memory.gpu if plan.device == "emulated" else {})
    return sum(sum(kinds.values()) - kinds.get("drafter", 0) for kinds in places)


def free_host_bytes(root: Path = Path("/")) -> int:
    """Host memory that can be written now, swap included, within the control groups' limits."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    within = free_memory_bytes(root)
    return free if within is None else min(free, within)


def free_address_space() -> int | None:
    """What a limit of this process's address space leaves; None without one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


@contextmanager
def memory_named(what: str) -> Iterator[None]:
    """Around work on `what`: whatever runs out of memory or threads in it is a MemoryBudgetError."""
    try:
        yield
    except MemoryBudgetError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        ran_out = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if not ran_out and not any(words in str(error) for words in NO_MEMORY_WORDS):
            raise
        first_line = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise MemoryBudgetError(f"memory ran out while {what} ({first_line}); {WAY_OUT}") from error


@contextmanager
def temporary_files_named(what: str) -> Iterator[None]:
    """Around the writing of `what` into temporary files, and nothing else: that it fails is a HeteroError."""
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "any folder for them"  # None where no folder takes a file
        raise HeteroError(
            f"{what} cannot be kept as temporary files in {folder} ({error.strerror or error}); free some "
            "room there, or name another folder by TMPDIR"
        ) from error
