"""How the profilers time: memory that no cache keeps, medians after a warm-up, and rivals turn by turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch

from cpu_kernels import CpuKernels, fresh_memory
from placement.machine.fingerprint import last_level_cache_bytes

FLOAT32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the process has made its default

CACHES = 8  # with 3, a third of the reads still came from the cache: 210 GB/s where DRAM gives 156
REPETITIONS = 9
MANY_REPETITIONS = 40
# Of one measurement that takes longer: its repetitions end after so many seconds, but not before there are a few.
MOST_SECONDS, LEAST_REPETITIONS = 0.1, 3
# A call over memory that no cache keeps is made over a part of it, every time the next one, where it takes much longer
# than PART_SECONDS: when the turn comes back to a part, no cache has it any more, as if all had been read.
MOST_PARTS, PART_SECONDS = 8, 0.02
# Bytes of a packed weight, and of a page of codes: as bfloat16, float32 or a float16 scale they are finite numbers of
# ordinary size, which is all that timing asks of them.
WEIGHT_BYTE = 0x3C
CALLS = 100  # of a small op, timed together

Progress = Callable[[str], None]


def seconds(work: Callable[[], object], repetitions: int | None = None) -> float:
    """Median time of one call, warmed up."""
    return statistics.median(_times(work, repetitions))


def least_seconds(work: Callable[[], object]) -> float:
    """The shortest of many times of one call, warmed up: where small differences of times count, of which a program
    that takes a core from the team leaves nothing."""
    return min(_times(work, MANY_REPETITIONS))


def _times(work: Callable[[], object], repetitions: int | None = None) -> list[float]:
    work()
    times: list[float] = []
    for _ in range(repetitions or REPETITIONS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        if sum(times) > MOST_SECONDS and len(times) >= LEAST_REPETITIONS:
            break
    return times


def recorded_seconds(ops: CpuKernels, work: Callable[[], None], count: int = 1) -> float:
    """Median time of `work` in a recorded program of `count` of it.

    Many in one program keep the whole team awake, as in a step. `work` keeps the tensors alive that a program only
    knows by address.
    """

    def many() -> None:
        for _ in range(count):
            work()

    return seconds(ops.record(many).run) / count


def turn_by_turn(work: Callable[[], object], yardstick: Callable[[], object]) -> float:
    """Median of the yardstick's time over that of `work`, measured in turns."""
    return statistics.median(measured / worked for measured, worked in turns(work, yardstick))


def turns(work: Callable[[], object], yardstick: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds of the yardstick and of `work` just after it, several times, warmed up."""
    found: list[tuple[float, float]] = []
    for _ in range(2 * REPETITIONS + 1):
        times = []
        for call in (yardstick, work):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        found.append((times[0], times[1]))
        if sum(map(sum, found)) > MOST_SECONDS and len(found) > 2 * LEAST_REPETITIONS:
            break
    return found[1:]


def parts_for(work: Callable[[], object]) -> int:
    """How many parts to cut the memory of a call into, a power of two. work: the call over one of MOST_PARTS."""
    started = time.perf_counter()
    work()
    taken, parts = MOST_PARTS * (time.perf_counter() - started), 1
    while parts < MOST_PARTS and taken >= 2 * parts * PART_SECONDS:
        parts *= 2
    return parts


def in_rotation(calls: Sequence[Callable[[], object]], first: int = 0) -> Callable[[], object]:
    """One call that makes these in turn, from that of index `first` on."""
    following = cycle([*calls[first:], *calls[:first]])
    return lambda: next(following)()


def beyond_caches(least_bytes: int) -> int:
    """The size of a buffer of which a pass finds nothing in the cache that the pass before left there."""
    return max(least_bytes, CACHES * last_level_cache_bytes())


def host_memory(size: int) -> torch.Tensor:
    """Bytes of host memory in large pages, as the runtime keeps weights and caches, every page of it touched."""
    return fresh_memory((size,), torch.uint8).fill_(WEIGHT_BYTE)
