"""What there is to learn on a lent GPU machine within a few minutes, in the order in which it is worth the time.

    python examples/benchmarks/gpu_offload.py --out DIR [--minutes 9] [--skip tests --skip kernels] [--only model]
    python examples/benchmarks/gpu_offload.py --out DIR --minutes 1 --device emulated --quick

The second is the same without a GPU: does every part run? No figure of it counts.

    sanity    kernels against float64, a toy model through captured steps beside one lane, percentiles of a hand-over, a
              launch queue that is full behind a parked wait
    rates     DRAM, CPU linear, bus, each alone and all at once, with nothing cached; they go into the profile for plans
    model     Llama-3.1-8B shape, q4, 75 % of the weights on the GPU by two plans, then 50 and 25 %, each loaded anew:
              decode at context 1k, prompts of 512 and 4096 tokens, where a step's time went, launches and copies of a
              prompt; predicted and the bound of the plan beside it
    experts   eight layers of Qwen3-30B-A3B, Q4_0, all but the experts on the GPU, with copies of a quarter of them
              there and without; needs the gguf package
    kernels   the q4 linear by rows and its stages apart, products straight into columns, attention beside torch's
    resize    a loaded model moved from 75 to 50 %
    peer      accelerate under the same cap; llama.cpp with --llama-bench
    tests     pytest -m gpu, for as long as there is time
    probe     a worker that waits inside the driver while the launch queue is full: last, because it may hang

Every part states its seconds and is skipped, with a line, where less is left. Every result is a line of
DIR/results.jsonl, written when it is known, so a run that is cut keeps what it has; parts already there are not
repeated. Parts run in a process of their own: one that fails is a line with its error and the next one begins; one that
hangs, dies or leaves the GPU broken is a line too, and the next one begins in a new process. Checkpoints are random
weights made here, one layer's values for all layers, while the sanity parts run; --work-dir keeps them. `gpu_report.py`
makes tables of the results, with what was expected and what to do where it differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpu.checkpoints import made_checkpoint
from gpu.run import BROKEN, LEAST_S, RUNNING_FILE, START, Run, gpu_used_bytes, run_parts, write_result

MINUTES = 9.0  # a command on a lent machine often ends at ten
POLL_S = 0.2
GRACE_S = 20.0  # after the time is up, for the part that is under way


def main() -> None:
    """Read the command line and run the parts until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or emulated")
    parser.add_argument("--quick", action="store_true", help="toy shapes: does every part run?")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench binary built for this GPU")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="parts whose name begins so")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="no parts whose name begins so")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the deadline, by the clock of the system
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)  # a shape whose checkpoint is written, and no more
    options = parser.parse_args()
    if options.checkpoint:
        made_checkpoint(options.work_dir, options.checkpoint)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        run = Run(
            options.out, options.work_dir, options.device, options.quick, options.child, options.llama_bench,
            tuple(options.only), tuple(options.skip), gpu_used_bytes(options.device),
        )  # fmt: skip
        sys.exit(run_parts(run))
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = options.work_dir or Path(temporary)
        sys.exit(supervise([*sys.argv[1:], "--work-dir", str(work_dir)], options, work_dir))


def supervise(arguments: list[str], options: argparse.Namespace, work_dir: Path) -> int:
    """Run the parts in a child process, and in a new one after each that ended before its parts did; the exit code."""
    deadline = time.time() + 60 * options.minutes
    running = options.out / RUNNING_FILE
    running.unlink(missing_ok=True)
    write_result(options.out, START)
    writer = None if options.quick or options.minutes <= 0 else write_checkpoint(work_dir)
    try:
        while True:
            command = [sys.executable, __file__, *arguments, "--child", str(deadline)]
            child = subprocess.Popen(command, start_new_session=True)
            try:
                fault = _await(child, running, deadline)
            except BaseException:  # Ctrl-C does not reach a session of its own
                _end(child)
                raise
            if running.exists():
                write_result(options.out, json.loads(running.read_text())["name"], error=fault)
                running.unlink()
            elif child.returncode != BROKEN:
                return child.returncode
    finally:
        if writer is not None:
            _end(writer)


def write_checkpoint(work_dir: Path) -> subprocess.Popen:
    """Begin to write the model's checkpoint in a process of its own."""
    command = [sys.executable, __file__, "--checkpoint", "8b", "--out", str(work_dir), "--work-dir", str(work_dir)]
    return subprocess.Popen(command, start_new_session=True)


def _await(child: subprocess.Popen, running: Path, deadline: float) -> str:
    """Wait for the child, but not longer than its part may take, nor much longer than all of them; what ended it."""
    while child.poll() is None:
        time.sleep(POLL_S)
        with suppress(FileNotFoundError, json.JSONDecodeError):  # between two parts, or a name that is being written
            limit_s = json.loads(running.read_text()).get("limit_s", LEAST_S)
            if time.time() - running.stat().st_mtime > limit_s or time.time() > deadline + GRACE_S:
                _end(child)
                return f"took longer than {limit_s:g} s, or than all parts may, and was ended"
    return f"the process ended with {child.returncode}"


def _end(child: subprocess.Popen) -> None:
    """End the child and what it started: the tests and llama.cpp are processes of their own."""
    with suppress(ProcessLookupError):  # it has ended, and so has all that it started
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    main()
