"""A whole model on the CPU against llama.cpp and transformers: tokens a second, side by side in one run.

    python examples/benchmarks/whole_model.py --llama-python PYTHON --out FILE.json

What it answers: does the CPU lane read memory as fast as the machine can, and is it ahead of the programs people use?
It makes its own checkpoint of random weights and the same weights as GGUF (models/), checks that both sides compute the
same logits, then measures one comparison after another (sides/): every side in a process of its own, the same thread
count, runs interleaved (ours, peer, ours, peer, ...), medians.

The ceiling comes first: the speed of reading memory and doing nothing with it, measured again before every row. Our
GB/s are weights and cache that a decode step reads; `linears` is the speed of its linears over that of a sweep of the
same weights, `other` the share of the step that reads neither weights nor cache.

PYTHON is an interpreter with llama-cpp-python and gguf installed; without it, and without transformers, a peer is
reported as not installed and ours is measured alone. --llama-bench takes a binary for llama.cpp instead. The cache of
llama.cpp is F16 unless --kv says bf16; ours is bf16. The last line of the output is one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from models.random_checkpoint import MODEL_FILE, SHAPES, write_checkpoint
from sides.comparisons import COMPARISONS, HEADINGS, Comparison, Result

HERE = Path(__file__).resolve().parent
GGUF_TYPES = {"bf16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}
CHECK_TOKENS = [7, 77, 777, 3, 33, 333, 9, 99, 999, 1, 11, 111]
SPINNING_S = 0.1  # threads of the side that has just answered may spin for some 20 ms
# Squared error of the logits over their square; two unrelated models give 2. Weights of q4 and Q4_0 are rounded by
# different rules, each to about 0.7 % of its square in every layer.
MAX_LOGITS_NMSE = {"bf16": 0.02, "q8": 0.05, "q4": 1.0}


class Worker:
    """A side in a child process. Requests wait for their answer, so only one side works at a time."""

    def __init__(self, name: str, command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        """environment: what the child's has besides ours."""
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | (environment or {}),
        )
        self._read()

    def ask(self, **request: object) -> dict[str, object]:
        """Send a request and wait for its answer; raises RuntimeError with the child's last words if it dies."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, object]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{self._errors.read()[-3000:]}")


class Benchmark:
    """The options of a run, the files it works on and how a side is started."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sweep_megabytes = 64 if options.quick else 512
        self.checkpoint = options.work_dir / options.shape
        self.missing = {peer: self._why_missing(peer) for peer in ("llama.cpp", "transformers")}

    def make_files(self, dtypes: set[str]) -> None:
        """Write the checkpoint, and the GGUF files that a peer will read, unless they are there."""
        if not (self.checkpoint / MODEL_FILE).exists():
            write_checkpoint(SHAPES[self.options.shape], self.checkpoint)
        for dtype in sorted(dtypes if self.missing["llama.cpp"] is None else ()):
            if not self._gguf(dtype).exists():
                command = [self.options.llama_python, HERE / "models/random_checkpoint.py", "gguf", self.checkpoint]
                subprocess.run([*command, self._gguf(dtype), "--type", GGUF_TYPES[dtype]], check=True)

    def start(self, side: str, dtype: str, context: int, rows: int) -> Worker:
        """Start ours, or a peer."""
        options = self.options
        common = ["--threads", options.threads, "--context", context, "--rows", rows]
        if side == "hetero-attn":
            command = [sys.executable, HERE / "sides/ours.py", side, "--model", self.checkpoint, "--dtype", dtype]
        elif side == "transformers":
            command = [sys.executable, HERE / "sides/peers.py", side, "--model", self.checkpoint]
        else:
            binary = ["--llama-bench", options.llama_bench] if options.llama_bench else []
            kind = "llama-bench" if options.llama_bench else "llama.cpp"
            command = [options.llama_python, HERE / "sides/peers.py", kind, "--model", self._gguf(dtype), *binary]
            common += ["--kv", options.kv, "--flash-attention", options.flash_attention, "--ubatch", options.ubatch]
        return Worker(side, [*command, *common])

    def can_check_logits(self, side: str) -> bool:
        """Whether a side can be asked for logits; a llama-bench binary cannot."""
        return side != "llama.cpp" or self.options.llama_bench is None

    def _gguf(self, dtype: str) -> Path:
        return self.checkpoint.with_name(f"{self.checkpoint.name}-{GGUF_TYPES[dtype]}.gguf")

    def _why_missing(self, peer: str) -> str | None:
        """None if a peer can be measured, else why not."""
        if peer not in self.options.peers:
            return "not asked for"
        if peer == "transformers":
            return None if find_spec("transformers") else "not installed"
        needed = "import gguf" if self.options.llama_bench else "import gguf, llama_cpp"
        try:
            run = subprocess.run([self.options.llama_python, "-c", needed], capture_output=True, check=False)
        except OSError as error:
            return f"not installed: no interpreter to ask ({error.strerror})"
        return None if run.returncode == 0 else f"not installed: `{needed}` fails"


def run_group(
    bench: Benchmark, comparisons: Sequence[Comparison], facts: dict[str, object], show: Callable[[str], None]
) -> list[Result]:
    """Measure the comparisons of one weight dtype with one peer, models loaded once; adds what is to be recorded to
    `facts`."""
    dtype = comparisons[0].dtype
    context = max(item.depth + item.tokens * item.rows for item in comparisons) + 64
    rows = max(item.rows for item in comparisons)
    peer = comparisons[0].peer
    with ExitStack() as stack:
        ours = stack.enter_context(bench.start("hetero-attn", dtype, context, rows))
        about = ours.ask(test="about")
        if "isa" not in facts:
            facts["isa"] = about["isa"]
            facts["ceiling_bytes_per_s"] = ours.ask(test="sweep", megabytes=bench.sweep_megabytes)["bytes_per_s"]
            show(f"ceiling: {facts['ceiling_bytes_per_s'] / 1e9:.1f} GB/s, a read-only sweep of memory\n\n{HEADINGS}")
        worker = None if bench.missing[peer] else stack.enter_context(bench.start(peer, dtype, context, rows))
        if worker is not None and bench.can_check_logits(peer):
            facts["logits_nmse"][f"{peer} {dtype}"] = check_logits(ours, worker, dtype)
        results = []
        for comparison in comparisons:
            results.append(measure(bench, comparison, ours, worker, about))
            show(results[-1].line())
        facts["versions"] |= about["versions"] | ({} if worker is None else worker.ask(test="about")["versions"])
    return results


def measure(
    bench: Benchmark, comparison: Comparison, ours: Worker, peer: Worker | None, about: dict[str, object]
) -> Result:
    """Run one comparison: each side warmed up, then turn by turn."""
    ceiling = ours.ask(test="sweep", megabytes=bench.sweep_megabytes)["bytes_per_s"]
    sides = [side for side in (ours, peer) if side is not None]
    for side in sides:
        side.ask(**comparison.request | {"tokens": min(comparison.tokens, 32)})
    runs: dict[Worker, list[float]] = {side: [] for side in sides}
    for _ in range(bench.options.repetitions):
        for side in sides:
            time.sleep(SPINNING_S)
            runs[side].append(figure(side, comparison))
    median = {side: statistics.median(values) for side, values in runs.items()}
    why = bench.missing[comparison.peer]
    result = Result(
        comparison.name,
        comparison.unit,
        median[ours],
        None if peer is None else median[peer],
        comparison.peer if why is None else f"{comparison.peer} {why}",
        None if peer is None else statistics.median(a / b for a, b in zip(runs[ours], runs[peer], strict=True)),
        comparison.least,
        comparison.aim,
        tuple(runs[ours]),
        tuple(runs.get(peer, ())),
        ceiling,
    )
    return result if comparison.test != "decode" else with_physics(comparison, result, ours, about)


def figure(side: Worker, comparison: Comparison) -> float:
    """One run: tokens a second, or for a batch the time of a step over that of a step of one row."""
    if comparison.test == "batch":
        one, many = (side.ask(**comparison.request | {"rows": rows})["seconds"] for rows in (1, comparison.rows))
        return many / one
    return comparison.tokens / side.ask(**comparison.request)["seconds"]


def with_physics(comparison: Comparison, result: Result, ours: Worker, about: dict[str, object]) -> Result:
    """Add what our decode step reads, how fast, and how much of its time is spent otherwise."""
    physics = ours.ask(test="physics")
    cache = about["kv_bytes_per_token"] * (comparison.depth + comparison.tokens / 2)
    return replace(
        result,
        bytes_per_s=(about["weight_bytes"] + cache) * result.ours,
        ceiling_share=physics["sweep_s"] / physics["linears_s"],
        other_share=1 - physics["reading_s"] / physics["step_s"],
    )


def check_logits(ours: Worker, peer: Worker, dtype: str) -> float:
    """Squared difference of both sides' logits over their square; RuntimeError if they run different models."""
    left, right = (side.ask(test="logits", token_ids=CHECK_TOKENS)["logits"] for side in (ours, peer))
    nmse = sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) / sum(b * b for b in right)
    if not nmse < MAX_LOGITS_NMSE[dtype]:
        raise RuntimeError(
            f"{dtype}: our logits and those of {peer.name} differ by NMSE {nmse:.2g}, more than "
            f"{MAX_LOGITS_NMSE[dtype]}: they do not run the same model, so their speeds cannot be compared"
        )
    return nmse


def machine(threads: int) -> dict[str, object]:
    """Hardware and system of this run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu,
        "usable_cpus": usable_cpus(),
        "threads": threads,
        "memory_bytes": memory,
        "system": platform.platform(),
    }


def usable_cpus() -> int:
    """Logical CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit that was measured, marked if files were changed since."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    names = [comparison.name for comparison in COMPARISONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3.2-1b, or tiny with --quick")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {', '.join(names)}")
    peers = ("llama.cpp", "transformers")
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of every side; default: all usable CPUs")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "hetero-attn-benchmarks",
        help="where checkpoint and GGUF files are made and kept, about 7 GB",
    )
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench binary to measure instead of llama_cpp")
    parser.add_argument("--kv", choices=("f16", "bf16"), default="f16", help="cache dtype of llama.cpp")
    parser.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp")
    parser.add_argument("--ubatch", type=int, default=512, help="of llama.cpp")
    parser.add_argument("--quick", action="store_true", help="few tokens: shows that all works, not how fast")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    options.shape = options.shape or ("tiny" if options.quick else "llama-3.2-1b")
    options.repetitions = min(options.repetitions, 2) if options.quick else options.repetitions
    return options


def show(text: str) -> None:
    """Print at once, so that a long run can be followed."""
    print(text, flush=True)


def main() -> None:
    """Run the comparisons that were asked for."""
    options = parse_options()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Benchmark(options)
    chosen = [item.quick() if options.quick else item for item in COMPARISONS if item.name in options.rows]
    facts: dict[str, object] = {"machine": machine(options.threads), "versions": {}, "logits_nmse": {}}
    show(
        f"{options.shape}, random weights; {facts['machine']['cpu']}, {options.threads} threads; median of "
        f"{options.repetitions}" + (" -- QUICK: figures mean nothing" if options.quick else "")
    )
    bench.make_files({item.dtype for item in chosen if item.peer == "llama.cpp"})
    results = []
    # One peer at a time: a deep cache on every side beside a third copy of the weights would not fit in 12 GB.
    for dtype, peer in product(GGUF_TYPES, bench.missing):
        if group := [item for item in chosen if (item.dtype, item.peer) == (dtype, peer)]:
            results += run_group(bench, group, facts, show)
    record = {
        "benchmark": "whole_model",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "shape": options.shape,
        "quick": options.quick,
        "repetitions": options.repetitions,
        "llama_cpp": {"kv": options.kv, "flash_attention": options.flash_attention, "ubatch": options.ubatch},
        **facts,
        "peers": {peer: why or "measured" for peer, why in bench.missing.items()},
        "rows": [asdict(result) | {"target": result.verdict} for result in results],
    }
    show(f"\nlogits of both sides, NMSE: {facts['logits_nmse'] or 'no peer'}\nversions: {facts['versions']}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
