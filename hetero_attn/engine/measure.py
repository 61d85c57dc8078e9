"""Measuring this machine: the one place that runs it for seconds. Planning only reads what was kept."""

import warnings
from collections.abc import Callable

from hetero_attn.planning.profiles import host_memory_bytes, is_kept, keep, lane_threads, stored_profile, why_not_kept
from placement.machine.hardware import HardwareProfile


def profile_machine(on_progress: Callable[[str], None] = lambda what: None, save: bool = True) -> HardwareProfile:
    """Measure this machine, keep the result for later plans, and return it; takes two to three minutes on two cores,
    kernels compiled for it included.

    on_progress(what) is called before each measurement. save=False leaves the kept profile alone; where it
    cannot be kept a warning says why.
    """
    import torch

    from hetero_attn.engine.runtime_costs import with_runtime_costs
    from placement.profilers.cpu import measure

    profile, device = measure(lane_threads(), host_memory_bytes(), on_progress), "cpu"
    if torch.cuda.is_available():
        profile, device = _with_gpu(profile, on_progress), "cuda"
    on_progress("Python and hand-overs")
    profile = with_runtime_costs(profile, device)
    if save:
        keep(profile)
    return profile


def _with_gpu(profile: HardwareProfile, on_progress: Callable[[str], None]) -> HardwareProfile:
    import gpu_kernels
    from placement.profilers.gpu import TorchGpu, measure_gpu

    return measure_gpu(TorchGpu(gpu_kernels), profile, on_progress)


def refresh_profile() -> None:
    """Measure this machine again, which takes some seconds, where the kept profile is damaged, stale or of another one.

    Nothing is measured where none was ever kept, for nobody asked for it, and where the result could not be kept: every
    start would measure.
    """
    if is_kept() and stored_profile() is None and not why_not_kept():
        message = "the kept profile is damaged or of another machine or version: measuring this machine again"
        warnings.warn(message, stacklevel=3)
        profile_machine()
