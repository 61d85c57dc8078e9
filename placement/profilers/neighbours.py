"""How much of the CPUs others use while something is measured: rates that were taken meanwhile are too low."""

import time

import psutil

NOT_BUSY = {"idle", "iowait", "guest", "guest_nice"}  # guests are in the times of their hosts already


class Neighbours:
    """What other processes, and a hypervisor, take of the CPUs from now on."""

    def __init__(self) -> None:
        self._since_s, self._used_s = time.perf_counter(), _others_s()

    def share(self) -> float:
        """Their CPU time as a share of what all CPUs could have given since; 0 to 1, and 0 where the system does not
        tell."""
        possible_s = (time.perf_counter() - self._since_s) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, _others_s() - self._used_s) / possible_s) if possible_s > 0 else 0.0


def _others_s() -> float:
    """CPU seconds of everything but this process and the children that it has waited for, since the system started."""
    everyone, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    busy_s = sum(seconds for name, seconds in everyone.items() if name not in NOT_BUSY)
    return busy_s - own.user - own.system - own.children_user - own.children_system
