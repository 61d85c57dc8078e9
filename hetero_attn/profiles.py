"""This machine's kept profile: JSON that `measure` wrote, recognised as stale or foreign by its fingerprint.

Nothing here measures: who wants a measurement asks `hetero_attn.measure` for it.
"""

import hashlib
import os
import warnings
from pathlib import Path

import psutil

from cpu_kernels.cgroups import memory_limit_bytes
from cpu_kernels.topology import default_threads, physical_cpus
from placement.hardware import HardwareProfile

LEAST_TO_SHARE = 4  # cores; with fewer, one is too large a part of the lane
HOST_MEMORY_SHARE = 0.9  # the rest is for the system and for Python itself


def stored_profile() -> HardwareProfile | None:
    """The kept profile of this very machine and these versions; None when there is none or it is damaged or stale."""
    from placement.fingerprint import machine_fingerprint

    try:
        profile = HardwareProfile.from_json(profile_path().read_text())
    except (OSError, ValueError):
        return None
    return profile if profile.fingerprint == machine_fingerprint(lane_threads()) else None


def current_profile() -> HardwareProfile | None:
    """The kept profile to plan with, None where there is none; warns where one is kept that cannot be used."""
    profile = stored_profile()
    if profile is None and profile_path().exists():
        message = (
            "the kept profile is damaged or of another machine or version and is not used; "
            "`hetero-attn profile` measures this machine again"
        )
        warnings.warn(message, stacklevel=3)
    return profile


def keep(profile: HardwareProfile) -> None:
    """Keep a profile of this machine for later plans, in place of the one before."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(profile.to_json() + "\n")
    temporary.replace(path)


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
