"""This machine's kept profile: JSON that `measure` wrote, recognised as stale or foreign by its fingerprint.

Nothing here measures: who wants a measurement asks `hetero_attn.engine.measure` for it.
"""

import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path

from cpu_kernels.team.cgroups import memory_limit_bytes
from cpu_kernels.team.kept_files import UnusableFileError, cache_home, read_kept, why_not_writable, write_kept
from cpu_kernels.team.topology import default_threads, physical_cpus
from placement.machine.fingerprint import machine_fingerprint
from placement.machine.gpu_here import has_gpu
from placement.machine.hardware import HardwareProfile

LEAST_TO_SHARE = 4  # cores; with fewer, one is too large a part of the lane
MOST_PROFILE_BYTES = 1 << 20
NOT_MEASURED = "this machine"  # what plans call it, whose rates are another one's
HOST_MEMORY_SHARE = 0.9  # the rest is for the system and for Python itself


def stored_profile() -> HardwareProfile | None:
    """The kept profile of this very machine and these versions; None when there is none that can be used."""
    path, threads = profile_path(), lane_threads()
    if path is None:
        return None
    try:
        profile = HardwareProfile.from_json(read_kept(path, MOST_PROFILE_BYTES).decode())
    except (OSError, ValueError):  # not to be trusted, damaged, or with values that no machine has
        return None
    return profile if profile.fingerprint == machine_fingerprint(threads) and profile.cores <= threads else None


def is_kept() -> bool:
    """Whether there is anything where the profile of this machine is kept."""
    path = profile_path()
    return path is not None and os.path.lexists(path)


def current_profile() -> HardwareProfile | None:
    """The kept profile to plan with, None where there is none; warns where one is kept that cannot be used."""
    profile = stored_profile()
    if profile is None and is_kept():
        message = (
            "the kept profile is damaged or of another machine or version and is not used; "
            "`hetero-attn profile` measures this machine again"
        )
        warnings.warn(message, stacklevel=3)
    return profile


def machine_profile(device: str) -> HardwareProfile:
    """The rates to plan with on this machine: measured ones if a profile is kept, else those of a machine of the
    catalogue that stands in for it, with the host memory and the threads of this one.

    An emulated GPU has rates of its own in the catalogue, and a machine around it; they say nothing about any GPU.
    """
    threads = lane_threads()
    if device == "emulated":
        return HardwareProfile.named("emulated").with_threads(threads)
    if device.startswith("cuda"):
        from hetero_attn.devices.machine import device_index, gpu_profile

        stored = current_profile()
        profile = gpu_profile(device_index(device), stored)
    else:
        stored = current_profile()
        profile = stored or HardwareProfile.named("generic-cpu")
    return profile if profile is stored else _as_this_machine(profile, threads)


def _as_this_machine(profile: HardwareProfile, threads: int) -> HardwareProfile:
    """A machine of the catalogue in the place of this one, by what a user knows: nobody here has heard of its name."""
    source = f"not measured but those of {profile.name}, {profile.source}"
    own = replace(profile.with_threads(threads), name=NOT_MEASURED, source=source)
    return replace(own, dram_bytes=host_memory_bytes())


def why_not_kept() -> str:
    """Why a profile of this machine could not be kept; empty where it could."""
    path = profile_path()
    return "there is no home folder" if path is None else why_not_writable(path)


def keep(profile: HardwareProfile) -> None:
    """Keep a profile of this machine for later plans, in place of the one before; warns where that is not possible."""
    reason = why_not_kept()
    try:
        if not reason:
            write_kept(profile_path(), f"{profile.to_json()}\n".encode())
    except UnusableFileError as error:
        reason = str(error)
    if reason:
        warnings.warn(f"the profile is not kept ({reason}); XDG_CACHE_HOME names another folder", stacklevel=3)


def lane_threads() -> int:
    """The most threads that the CPU lane should have here: the cores, but for one where a GPU is fed from another
    thread.

    With 16 threads on 16 cores beside an H100 the CPU's part of a layer took 550 us, with 15 it took 300.
    """
    threads = default_threads(physical_cpus())
    return threads - 1 if threads >= LEAST_TO_SHARE and has_gpu() else threads


def profile_path() -> Path | None:
    """Where this machine's profile is kept: one file a host, in the user's cache folder; None where there is none."""
    host = hashlib.sha256(os.uname().nodename.encode() if hasattr(os, "uname") else b"host").hexdigest()[:12]
    home = cache_home()
    return None if home is None else home / "hetero_attn" / "profiles" / f"{host}.json"


def host_memory_bytes() -> int:
    """Host memory that a plan may count on: what is free now, within the control group's limit."""
    import psutil  # compiles its patterns when it is imported

    available = psutil.virtual_memory().available
    limit = memory_limit_bytes(Path("/"))
    return int(HOST_MEMORY_SHARE * (available if limit is None else min(available, limit)))
