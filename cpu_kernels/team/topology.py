"""Which cores this process may use: its affinity, one logical CPU per physical core, its cgroup's quota."""

import os
from pathlib import Path

from cpu_kernels.team.cgroups import cpu_quota


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cpus() -> list[int]:
    """One logical CPU per physical core among those this process may use, in order."""
    found, cores = [], set()
    for cpu in _usable_cpus():
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = topology.read_text()
        except OSError:
            core = str(cpu)
        if core not in cores:
            cores.add(core)
            found.append(cpu)
    return found


def default_threads(cpus: list[int], root: Path = Path("/")) -> int:
    """As many threads as physical cores, or fewer under a quota of this process's control groups."""
    quota = cpu_quota(root)
    return len(cpus) if quota is None else max(1, min(len(cpus), int(quota)))
