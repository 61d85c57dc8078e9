"""The same GGUF file in hetero_attn and in llama.cpp, on the CPU: decode and prefill, turn by turn.

    python examples/benchmarks/gguf_files.py FILE... --llama-python PYTHON
        [--isa NAME --llama-lib DIRECTORY] [--dtype q4] [--threads N] [--repetitions N] [--json] [--out FILE]

llama.cpp runs twice, with its weights repacked at load and without; the ratio is to the faster of both. A path of ours
that is forced with --isa is compared with a llama.cpp that was built for the same instructions, whose libraries lie in
--llama-lib. --dtype loads our side in another dtype than the file's. Both are fed the same random tokens; what the
routers of a mixture of experts choose over a prompt of so many is kept with each row. How far the logits of ours and of
the repacked setting are from the other setting's is said for one token and for eight. The ceiling is a read-only sweep
of memory; it is printed first, and beside each file the share of a sweep of the weights that a step reads, which our
linears reach in a decode step. With --threads 1 every side is timed by the CPU time of its process: what a busy machine
can still be asked. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from whole_model import HERE, SPINNING_S, Worker, commit, machine, usable_cpus

LEAST_CONTEXT = 1024
AGREEMENT_TOKENS = (1, 8)
HEADINGS = f"{'file':<34}{'test':<9}{'ours':>9}{'repack':>9}{'as is':>9}{'ratio':>7}{'linears':>9}"


@dataclass(frozen=True, slots=True)
class Row:
    """One test of one file; figures in tokens per second, medians.

    linears_share: of a sweep, None for prefill. routes: see `ours.HeteroAttn._routes`, None without experts.
    logits_nmse: see `agreement`.
    """

    file: str
    dtype: str
    test: str
    tokens: int
    ours: float
    llama_repacked: float
    llama_as_is: float
    ratio: float
    linears_share: float | None
    routes: dict[str, float] | None = None
    logits_nmse: dict[str, float] | None = None

    def line(self) -> str:
        """One row of the table."""
        name = self.file if self.dtype == "auto" else f"{self.file} as {self.dtype}"
        share = "" if self.linears_share is None else f"{self.linears_share:9.0%}"
        figures = f"{self.ours:9.1f}{self.llama_repacked:9.1f}{self.llama_as_is:9.1f}{self.ratio:7.2f}"
        return f"{name:<34.33}{self.test:<9}{figures}{share}"


def start(options: argparse.Namespace, stack: ExitStack, file: Path) -> dict[str, Worker]:
    """Ours and both settings of llama.cpp, each with the file loaded."""
    context = max(LEAST_CONTEXT, options.prefill_tokens)
    common = ["--model", file, "--threads", options.threads, "--context", context]
    ours = [sys.executable, HERE / "sides/ours.py", "hetero-attn", *common, "--dtype", options.dtype]
    ours += ["--isa", options.isa] if options.isa else []
    peer = [options.llama_python, HERE / "sides/peers.py", "llama.cpp", *common]
    environment = {"LLAMA_CPP_LIB_PATH": str(options.llama_lib)} if options.llama_lib else {}
    sides = {"ours": Worker("hetero-attn", ours)}
    sides["repacked"] = Worker("llama.cpp", peer, environment)
    sides["as is"] = Worker("llama.cpp", [*peer, "--no-repack"], environment)
    for side in sides.values():
        stack.enter_context(side)
    return sides


def agreement(sides: dict[str, Worker]) -> dict[str, float]:
    """Squared error over squared norm of the last token's logits of two sides, to those of llama.cpp as it is."""
    found = {}
    for count in AGREEMENT_TOKENS:
        token_ids = [(7919 * index + 5) % 1000 for index in range(count)]
        wanted = sides["as is"].ask(test="logits", token_ids=token_ids)["logits"]
        for name in ("ours", "repacked"):
            logits = sides[name].ask(test="logits", token_ids=token_ids)["logits"]
            error = sum((one - other) ** 2 for one, other in zip(logits, wanted, strict=True))
            found[f"{name}, tokens: {count}"] = error / sum(value**2 for value in wanted)
    return found


def compare(options: argparse.Namespace, file: Path, sides: dict[str, Worker], test: str, tokens: int) -> Row:
    """Both tests' medians and the median of the ratios of neighbouring runs."""
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(options.repetitions + 1):
        for name, side in sides.items():
            time.sleep(SPINNING_S)
            answer = side.ask(test=test, tokens=tokens if repetition else min(tokens, 32), depth=0)
            seconds = answer["cpu_seconds" if options.threads == 1 else "seconds"]
            if repetition:  # the first warms up
                runs[name].append(tokens / seconds)
    pairs = zip(runs["ours"], runs["repacked"], runs["as is"], strict=True)
    ratio = statistics.median(ours / max(peers) for ours, *peers in pairs)
    physics = sides["ours"].ask(test="physics") if test == "decode" else None
    share = physics["sweep_s"] / physics["linears_s"] if physics else None
    medians = (statistics.median(values) for values in runs.values())
    routes = sides["ours"].ask(test="routes", tokens=tokens) or None
    return Row(file.name, options.dtype, test, tokens, *medians, ratio, share, routes)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--llama-python", required=True, help="interpreter with llama_cpp")
    parser.add_argument("--llama-lib", type=Path, help="directory of llama.cpp's libraries, built for --isa")
    parser.add_argument("--isa", help="instruction set that our side is held to; default: the best of this CPU")
    parser.add_argument("--dtype", default="auto", help="of our weights; default: what the file holds")
    parser.add_argument("--tests", nargs="+", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also add the rows to this JSON file")
    return parser.parse_args()


def merged(record: dict, path: Path) -> dict:
    """The record with the rows of an earlier run of other files, or of the same in another dtype, before its own."""
    if not path.exists():
        return record
    own = {(row["file"], row["dtype"], row["test"]) for row in record["rows"]}
    earlier = json.loads(path.read_text())["rows"]
    kept = [row for row in earlier if (row["file"], row["dtype"], row["test"]) not in own]
    return record | {"rows": kept + record["rows"]}


def main() -> None:
    """Measure every file, print, write."""
    options = parse_options()
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    record: dict = {
        "benchmark": "gguf_files",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(options.threads),
        "repetitions": options.repetitions,
        "clock": "CPU time" if options.threads == 1 else "wall time",
        "rows": [],
    }
    tokens = {"decode": options.decode_tokens, "prefill": options.prefill_tokens}
    for file in options.files:
        with ExitStack() as stack:
            sides = start(options, stack, file)
            if "isa" not in record:
                ours, peer = (sides[name].ask(test="about") for name in ("ours", "repacked"))
                record |= {"isa": ours["isa"], "versions": ours["versions"] | peer["versions"]}
                record["ceiling_bytes_per_s"] = sides["ours"].ask(test="sweep", megabytes=512)["bytes_per_s"]
                say(f"{record['machine']['cpu']}, {record['isa']}, {options.threads} threads")
                say(f"tokens per second of {record['clock']}")
                say(f"ceiling: {record['ceiling_bytes_per_s'] / 1e9:.1f} GB/s, a read-only sweep\n\n{HEADINGS}")
            nmse = agreement(sides)
            say("NMSE of logits: " + "; ".join(f"{name} {value:.1e}" for name, value in nmse.items()))
            for test in options.tests:
                row = replace(compare(options, file, sides, test, tokens[test]), logits_nmse=nmse)
                record["rows"].append(asdict(row))
                say(row.line())
    if options.out:
        options.out.write_text(json.dumps(merged(record, options.out), indent=1) + os.linesep)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
