"""Measuring this machine: the one place that runs it for seconds. Planning only reads what was kept."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from hetero_attn.planning.profiles import host_memory_bytes, is_kept, keep, lane_threads, stored_profile, why_not_kept
from placement.machine.hardware import HardwareProfile


def profile_machine(
    on_progress: Callable[[str], None] = lambda what: None,
    save: bool = True,
    keep_when_busy: bool = False,
    formats: Sequence[str] = (),
    caches: Sequence[tuple[str, int, int]] = (),
) -> HardwareProfile:
    """Measure this machine, keep the result for later plans, and return it; takes a quarter of a minute on two cores,
    up to a minute where its kernels must be compiled first.

    on_progress(what) is called before each measurement. save=False leaves the kept profile alone; where it
    cannot be kept a warning says why. So it does where other programs used more than a tenth of the CPUs meanwhile,
    which makes rates too low: such a profile is kept only with keep_when_busy. formats: weight formats that the CPU
    lane's linears are measured in beside fp32, bf16, q8 and q4; caches: (dtype, query heads per KV head, head size)
    whose attention is measured beside that of every profile. Plans take others from the nearest that was measured.
    Raises MemoryBudgetError where memory or threads run out.
    """
    from hetero_attn.engine.host_memory import memory_named

    with memory_named("measuring this machine"):
        profile = _measured(on_progress, formats, caches)
    if profile.is_of_a_busy_machine:
        _warn_of_others(profile, save, keep_when_busy)
    if save and (keep_when_busy or not profile.is_of_a_busy_machine):
        keep(profile)
    return profile


def _measured(
    on_progress: Callable[[str], None], formats: Sequence[str], caches: Sequence[tuple[str, int, int]]
) -> HardwareProfile:
    import torch

    from hetero_attn.engine.runtime_costs import with_runtime_costs
    from placement.profilers.cpu import measure
    from placement.profilers.neighbours import Neighbours

    neighbours = Neighbours()
    profile, device = measure(lane_threads(), host_memory_bytes(), on_progress, formats=formats, caches=caches), "cpu"
    if torch.cuda.is_available():
        profile, device = _with_gpu(profile, on_progress), "cuda"
    on_progress("Python and hand-overs")
    return replace(with_runtime_costs(profile, device), busy_share=neighbours.share())


def _warn_of_others(profile: HardwareProfile, save: bool, keep_when_busy: bool) -> None:
    kept = "it is kept all the same" if keep_when_busy else "it is not kept"
    way_out = "" if keep_when_busy else ", or give --keep (in Python keep_when_busy=True)"
    message = (
        f"other programs used {profile.busy_share:.0%} of the CPUs while this machine was measured, so its rates may "
        f"be too low{f'; {kept}' if save else ''}: measure again when it is quiet{way_out if save else ''}"
    )
    warnings.warn(message, stacklevel=3)


def _with_gpu(profile: HardwareProfile, on_progress: Callable[[str], None]) -> HardwareProfile:
    import gpu_kernels
    from placement.profilers.gpu import TorchGpu, measure_gpu

    return measure_gpu(TorchGpu(gpu_kernels), profile, on_progress)


def refresh_profile(beforehand: Callable[[], object] = lambda: None) -> None:
    """Measure this machine again, which takes some seconds, where the kept profile is damaged, stale or of another one.

    Nothing is measured where none was ever kept, for nobody asked for it, and where the result could not be kept: every
    start would measure. What is measured on a busy machine is kept all the same, for every start would measure again.
    beforehand: called just before something is measured, its warnings left to who does the same afterwards; what it
    raises, such as for a wish that cannot be met at any speed, is told without the wait.
    """
    if is_kept() and stored_profile() is None and not why_not_kept():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            beforehand()
        message = "the kept profile is damaged or of another machine or version: measuring this machine again"
        warnings.warn(message, stacklevel=3)
        profile_machine(keep_when_busy=True)
