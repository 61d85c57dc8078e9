"""This machine's measured profile: made on request, kept as JSON, recognised as stale or foreign by its fingerprint."""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil

from cpu_kernels.cgroups import memory_limit_bytes
from cpu_kernels.topology import default_threads, physical_cpus
from placement.hardware import HardwareProfile

LEAST_TO_SHARE = 4  # cores; with fewer, one is too large a part of the lane
HOST_MEMORY_SHARE = 0.9  # the rest is for the system and for Python itself


def profile_machine(on_progress: Callable[[str], None] = lambda what: None, save: bool = True) -> HardwareProfile:
    """Measure this machine, keep the result for later plans, and return it; takes well under a minute.

    on_progress(what) is called before each measurement. save=False leaves the kept profile alone.
    """
    import torch

    from hetero_attn.runtime_profile import with_runtime_costs
    from placement.profiler import measure

    profile, device = measure(lane_threads(), host_memory_bytes(), on_progress), "cpu"
    if torch.cuda.is_available():
        profile, device = _with_gpu(profile, on_progress), "cuda"
    on_progress("Python and hand-overs")
    profile = with_runtime_costs(profile, device)
    if save:
        path = profile_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(profile.to_json() + "\n")
        temporary.replace(path)
    return profile


def _with_gpu(profile: HardwareProfile, on_progress: Callable[[str], None]) -> HardwareProfile:
    import gpu_kernels
    from placement.gpu_profiler import TorchGpu, measure_gpu

    return measure_gpu(TorchGpu(gpu_kernels), profile, on_progress)


def stored_profile() -> HardwareProfile | None:
    """The kept profile of this very machine and these versions; None when there is none or it is damaged or stale."""
    from placement.fingerprint import machine_fingerprint

    try:
        profile = HardwareProfile.from_json(profile_path().read_text())
    except (OSError, ValueError):
        return None
    return profile if profile.fingerprint == machine_fingerprint(lane_threads()) else None


def current_profile() -> HardwareProfile | None:
    """The kept profile; one that is damaged, stale or of another machine is measured again, which takes some seconds.

    None when none was ever kept: nothing is measured that nobody asked for.
    """
    profile = stored_profile()
    if profile is None and profile_path().exists():
        message = "the kept profile is damaged or of another machine or version: measuring this machine again"
        warnings.warn(message, stacklevel=3)
        profile = profile_machine()
    return profile


def lane_threads() -> int:
    """The most threads that the CPU lane should have here: the cores, but for one where a GPU is fed from another thread.

    With 16 threads on 16 cores beside an H100 the CPU's part of a layer took 550 us, with 15 it took 300.
    """
    import torch

    threads = default_threads(physical_cpus())
    return threads - 1 if threads >= LEAST_TO_SHARE and torch.cuda.is_available() else threads


def profile_path() -> Path:
    """Where this machine's profile is kept: one file a host, in the user's cache directory."""
    host = hashlib.sha256(os.uname().nodename.encode() if hasattr(os, "uname") else b"host").hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hetero_attn" / "profiles" / f"{host}.json"


def host_memory_bytes() -> int:
    """Host memory that a plan may count on: what is free now, within the control group's limit."""
    available = psutil.virtual_memory().available
    limit = memory_limit_bytes(Path("/"))
    return int(HOST_MEMORY_SHARE * (available if limit is None else min(available, limit)))
