"""What loading a model takes: CPU seconds for each GB of its file, wall time, and the most memory beside the weights.

    python examples/benchmarks/load_speed.py MODEL[:DTYPE] ... [--threads 2] [--repetitions 3] [--cold]

Every load is a process of its own; the first one, which may compile kernels, does not count. A load is from the page
cache, into which the file is read first: loads themselves leave nothing there. With --cold the file is dropped from it
instead, and two ceilings stand beside, just before each load: the disk's speed, reading the same file from end to end
past the cache (O_DIRECT) into memory that has been written to, a place of its own for every byte, as a load needs; and
what a plain program gets that reads it through the cache into one buffer. Before a load twice as much memory as the
file has is written to once and given back, and the table says how fast that went: a virtual machine may get memory only
when it is first touched, at a few hundred MB/s, and would measure that instead.

CPU seconds are those of all threads while weights are read and packed: a file of G GB in S of them keeps up, on T
threads that do nothing else, with a disk of T * G / S GB/s. Wall time means something only on a machine that does
nothing else. Memory is the process's peak without the page cache, less what it was before, less the packed weights.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from cpu_kernels import fresh_memory

LOAD = """
import json, sys, time
import torch
from cpu_kernels import fresh_memory
from hetero_attn import LLM
from hetero_attn.checkpoints.loading.load import Loader

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def touch(size):
    began = time.perf_counter()
    fresh_memory((size,), torch.uint8)[::4096] = 1
    return time.perf_counter() - began

def measured(loader, load=Loader.load):
    found["memory_s"] = touch(2 * int(size)) / 2  # what is freed is not all that the system gives out next
    open("/proc/self/clear_refs", "w").write("5")  # the peak of memory is counted from here
    before, began, cpu = kib("VmRSS"), time.perf_counter(), time.process_time()
    weights = load(loader)
    found.update(wall_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu)
    found.update(grown=(kib("VmHWM") - before) * 1024)
    return weights

found, Loader.load = {}, measured
path, dtype, threads, size = sys.argv[1:]
with LLM(path, dtype=dtype, device="cpu", max_context=64, num_threads=int(threads), progress=False) as llm:
    found["packed"] = llm.plan.workload.weight_bytes + llm.plan.workload.embed_bytes
print(json.dumps(found))
"""


READ_BYTES = 16 << 20  # at once, where the disk is measured
PAST_BYTES = 8 << 20


def files_of(path: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def file_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in files_of(path))


def drop(path: Path) -> None:
    """Have the system forget what it holds of a model's weights in memory."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_s(path: Path) -> float:
    """Seconds of reading a model's weights through the page cache, one read behind the other."""
    began, buffer = time.perf_counter(), bytearray(READ_BYTES)
    for file in files_of(path):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - began


def disk_s(path: Path) -> float:
    """Seconds of reading a model's weights past the page cache, each byte to its own place."""
    total = 0.0
    for file in files_of(path):
        size = file.stat().st_size
        memory = fresh_memory((size + PAST_BYTES,), torch.uint8).numpy()
        memory[::4096] = 1
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        began = time.perf_counter()
        for at in range(0, size, PAST_BYTES):
            os.preadv(descriptor, [memory[at : at + PAST_BYTES]], at)
        total += time.perf_counter() - began
        os.close(descriptor)
    return total


def measured(path: Path, dtype: str, threads: int, repetitions: int, cold: bool) -> dict[str, float]:
    """Medians over the loads that count."""
    command = [sys.executable, "-c", LOAD, str(path), dtype, str(threads), str(file_bytes(path))]
    runs = []
    for _ in range(repetitions + 1):
        ceiling = {}
        if cold:
            drop(path)
        seconds = read_s(path)
        if cold:
            ceiling = {"disk_s": disk_s(path), "plain_s": seconds}
            drop(path)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(ceiling | json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}


def main() -> None:
    """Measure each model and print a line for it, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="a directory or GGUF file, with :DTYPE behind it or not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="from the disk, beside what the disk can do")
    options = parser.parse_args()
    rows = []
    disk = f"{'disk':>6}{'plain':>7}" if options.cold else ""
    print("GB/s of the file but for the last column, which is MB; `could` is what the CPU seconds would allow")
    print(f"{'model':<30}{'dtype':>6}{'GB':>6}{disk}{'memory':>8}{'CPU s/GB':>10}{'could':>7}{'load':>6}{'beside':>8}")
    for model in options.models:
        name, _, dtype = model.partition(":")
        path, dtype = Path(name), dtype or "auto"
        found = measured(path, dtype, options.threads, options.repetitions, options.cold)
        size = file_bytes(path)
        each = found["cpu_s"] / size * 1e9
        rows.append({"model": path.name, "dtype": dtype, "file_bytes": size, **found})
        ceilings = [size / found[key] / 1e9 for key in ("disk_s", "plain_s", "memory_s") if key in found]
        disk = f"{ceilings[0]:>6.2f}{ceilings[1]:>7.2f}" if options.cold else ""
        speeds = f"{ceilings[-1]:>8.2f}{each:>10.2f}{options.threads / each:>7.1f}{size / found['wall_s'] / 1e9:>6.2f}"
        beside = (found["grown"] - found["packed"]) / 1e6
        print(f"{path.name[-29:]:<30}{dtype:>6}{size / 1e9:>6.2f}{disk}{speeds}{beside:>8.0f}", flush=True)
    print(
        json.dumps({"machine": platform.processor() or platform.machine(), "threads": options.threads, "loads": rows})
    )


if __name__ == "__main__":
    main()
