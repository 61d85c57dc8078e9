"""What loading a model takes: CPU seconds for each GB of its file, wall time, and the most memory beside the weights.

    python examples/benchmarks/load_speed.py MODEL[:DTYPE] ... [--threads 2] [--repetitions 3]

Every load is a process of its own; the first one, which may compile kernels and reads the file from the disk, does not
count. CPU seconds are those of all threads while weights are read and packed: a file of G GB in S of them keeps up,
on T threads that do nothing else, with a disk of T * G / S GB/s. Wall time means something only on a machine that does
nothing else. Memory is the process's peak without the page cache, less what it was before, less the packed weights.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

LOAD = """
import json, sys, time
from hetero_attn import LLM
from hetero_attn.checkpoints.loading.load import Loader

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def measured(loader, load=Loader.load):
    before, began, cpu = kib("VmRSS"), time.perf_counter(), time.process_time()
    weights = load(loader)
    found.update(wall_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu)
    found.update(grown=(kib("VmHWM") - before) * 1024)
    return weights

found, Loader.load = {}, measured
path, dtype, threads = sys.argv[1:]
with LLM(path, dtype=dtype, device="cpu", max_context=64, num_threads=int(threads), progress=False) as llm:
    found["packed"] = llm.plan.workload.weight_bytes + llm.plan.workload.embed_bytes
print(json.dumps(found))
"""


def file_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def measured(path: Path, dtype: str, threads: int, repetitions: int) -> dict[str, float]:
    """Medians over the loads that count."""
    command = [sys.executable, "-c", LOAD, str(path), dtype, str(threads)]
    runs = []
    for _ in range(repetitions + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}


def main() -> None:
    """Measure each model and print a line for it, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="a directory or GGUF file, with :DTYPE behind it or not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    rows = []
    print(f"{'model':<40}{'dtype':>6}{'GB':>7}{'CPU s/GB':>10}{'GB/s':>7}{'wall GB/s':>11}{'beside, MB':>12}")
    for model in options.models:
        name, _, dtype = model.partition(":")
        path, dtype = Path(name), dtype or "auto"
        found, size = measured(path, dtype, options.threads, options.repetitions), file_bytes(path)
        each = found["cpu_s"] / size * 1e9
        rows.append({"model": path.name, "dtype": dtype, "file_bytes": size, **found})
        speeds = f"{each:>10.2f}{options.threads / each:>7.1f}{size / found['wall_s'] / 1e9:>11.2f}"
        beside = (found["grown"] - found["packed"]) / 1e6
        print(f"{path.name[-39:]:<40}{dtype:>6}{size / 1e9:>7.2f}{speeds}{beside:>12.0f}", flush=True)
    print(
        json.dumps({"machine": platform.processor() or platform.machine(), "threads": options.threads, "loads": rows})
    )


if __name__ == "__main__":
    main()
