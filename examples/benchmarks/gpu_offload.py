"""Everything there is to learn on a GPU machine, in the order in which it is worth the time.

    python gpu_offload.py --out DIR --minutes 25
    python gpu_offload.py --out DIR --minutes 1 --device emulated --quick       the same code without a GPU; no figure counts

    a  tests       pytest -m gpu: kernels against float64, toy models on three lanes, budgets
    b  handover    microseconds of a hop by events, flags and in a captured graph
    c  profile     the machine's rates, kept for the plans that follow
    d  kernels     linear and attention alone against memory bandwidth, and torch's flash attention
    e  offload     Llama-3.1-8B shape, q4, with 75, 50 and 25 % of the weights on the GPU, context 1k: decode, prefill
                   512 and 4096, predicted beside measured and the bound of the plan, the lanes' timeline
    f  llama.cpp   with --llama-bench: the most layers that fit the same caps, the same tests; depths, with and without -nkvo
    g  depth       decode on top of up to 64k tokens, most of them beyond the cap
    h  offload     the same in bf16; accelerate's device_map at the same caps
    i  large       a 30B-class shape, q4, with 24 of its 60 layers: what a disk of 64 GiB holds beside the rest

Every result is a line of DIR/results.jsonl, written when it is known, so a run that is cut keeps what it has; parts
already there are not repeated. Parts run in a process of their own: one that fails is a line with its error and the next
one begins; one that hangs, dies or leaves the GPU broken is a line too, and the next one begins in a new process. No part
starts after its time is up. Checkpoints are random weights made here, one layer's values for all layers; --work-dir keeps
them. --only takes the beginnings of the parts' names.
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

from gpu_run import BROKEN, RUNNING_FILE, START, Run, gpu_used_bytes, run_parts, write_result

PART_LIMIT_S = 300.0
POLL_S = 0.2


def main() -> None:
    """Read the command line and run the parts until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or emulated")
    parser.add_argument("--quick", action="store_true", help="toy shapes: does every part run?")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench binary built for this GPU")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="parts whose name begins so")
    parser.add_argument("--part-seconds", type=float, default=PART_LIMIT_S, help="a part that takes longer is ended")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the deadline, by the clock of the system
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        run = Run(
            options.out, options.work_dir, options.device, options.quick, options.child, options.llama_bench,
            tuple(options.only), gpu_used_bytes(options.device),
        )  # fmt: skip
        sys.exit(run_parts(run))
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = options.work_dir or Path(temporary)
        sys.exit(supervise([*sys.argv[1:], "--work-dir", str(work_dir)], options))


def supervise(arguments: list[str], options: argparse.Namespace) -> int:
    """Run the parts in a child process, and in a new one after each that ended before its parts did; the exit code."""
    deadline = time.time() + 60 * options.minutes
    running = options.out / RUNNING_FILE
    running.unlink(missing_ok=True)
    write_result(options.out, START)
    while True:
        command = [sys.executable, __file__, *arguments, "--child", str(deadline)]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            fault = _await(child, running, options.part_seconds)
        except BaseException:  # Ctrl-C does not reach a session of its own
            _end(child)
            raise
        if running.exists():
            write_result(options.out, json.loads(running.read_text())["name"], error=fault)
            running.unlink()
        elif child.returncode != BROKEN:
            return child.returncode


def _await(child: subprocess.Popen, running: Path, part_seconds: float) -> str:
    """Wait for the child, but not longer than a part may take; what ended it."""
    while child.poll() is None:
        time.sleep(POLL_S)
        with suppress(FileNotFoundError):  # between two parts
            if time.time() - running.stat().st_mtime > part_seconds:
                _end(child)
                return f"took longer than {part_seconds:g} s and was ended"
    return f"the process ended with {child.returncode}"


def _end(child: subprocess.Popen) -> None:
    """End the child and what it started: the tests and llama.cpp are processes of their own."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    main()
