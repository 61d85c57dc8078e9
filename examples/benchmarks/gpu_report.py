"""What a run of `gpu_offload.py` found, as a record to keep, tables and a plot.

    python examples/benchmarks/gpu_report.py DIR RECORD.json [--plot PLOT.png]

The record holds every result without timelines; a part that failed or was skipped stays in it with the reason. The
first table (standard output, Markdown) puts the bound of each plan first, then what was measured, predicted, and what
peers reach under the same cap: in this run, or in the recorded one where it ran none. The second says what was expected
of each figure and what to decide where it lies elsewhere. The plot shows decode speed against the GPU memory allowed.
Needs matplotlib for the plot.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.expectations import EXPECTATIONS, Expectation

Result = dict[str, Any]
RECORD = Path(__file__).resolve().parent / "results/gpu/gpu_h100.json"  # its peers ran on the same kind of machine


def main() -> None:
    """Read the command line, write the record and the plot, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = read_results(options.directory)
    options.record.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join([*table(results), "", *expectations(results), "", *unfinished(results)]))
    if options.plot is not None:
        plot(results, options.plot)


def read_results(directory: Path) -> list[Result]:
    """The last line of every name that ran, or else its failure, or else why it did not."""
    last: dict[str, Result] = {}
    for line in (directory / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        before = last.get(result["name"])
        if result["name"] in ("start", "end") or (before is not None and _rank(result) < _rank(before)):
            continue
        last[result["name"]] = result
    return list(last.values())


def _rank(result: Result) -> int:
    """How much a line tells: that a part had no time, that it failed, what it found."""
    return 0 if "left_s" in result else 1 if "error" in result else 2


def table(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown: a row for each test of each plan and share of the weights."""
    yield "| model, share, plan: test | bound | measured | of bound | predicted | llama.cpp | accelerate |"
    yield "|---|---|---|---|---|---|---|"
    peers = _peers(results)
    for result in results:
        if "bound_tokens_per_s" not in result:
            continue
        bound, speed, predicted = (result[f"{kind}tokens_per_s"] for kind in ("bound_", "", "predicted_"))
        yield (
            f"| {result['name'].removeprefix('model ')} | {bound:.1f} | **{speed:.1f}** | {speed / bound:.0%} "
            f"| {predicted:.1f} ({predicted / speed - 1:+.0%}) | {_beside(speed, _llama(peers, result['name']))} "
            f"| {_beside(speed, _accelerate(peers, result['name']))} |"
        )


def expectations(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown: each figure that was expected, what was found, and what to do where it is another."""
    yield "| figure | expected | found | | if not |"
    yield "|---|---|---|---|---|"
    found = {result["name"]: result for result in results}
    for expected in EXPECTATIONS:
        value = expected.value(found)
        shown, verdict = ("-", "not run") if value is None else (f"{value:.4g}", _verdict(expected, value))
        yield (
            f"| {expected.name}, {expected.field} | {expected.low:g} to {expected.high:g} | {shown} | {verdict} "
            f"| {expected.decide} |"
        )


def unfinished(results: list[Result]) -> Iterator[str]:
    """A line for each part that failed or was skipped."""
    for result in results:
        if "error" in result or "skipped" in result:
            yield f"- {result['name']}: {result.get('error') or result['skipped']}"


def _verdict(expected: Expectation, value: float) -> str:
    if value < expected.low:
        return "below"
    return "above" if value > expected.high else "as expected"


def plot(results: list[Result], path: Path) -> None:
    """Decode tokens a second by GPU memory allowed: this runtime, its bound, and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, points in curves(results).items():
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", label=label, linestyle="--" if "bound" in label else "-"
        )
    axes.set(xlabel="GPU memory allowed (GiB)", ylabel="decode (tokens/s)", ylim=(0, None), title=_hardware(results))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def curves(results: list[Result]) -> dict[str, list[tuple[float, float]]]:
    """(GiB, tokens/s) of decode by what ran."""
    found: dict[str, list[tuple[float, float]]] = {}
    peers, memory = (_peers(results), {result["name"]: result.get("gpu_memory") for result in results})
    for result in results:
        part, _, row = result["name"].partition(": ")
        if not (row == "decode" and "tokens_per_s" in result and memory.get(f"{part}: memory")):
            continue
        gib, plan = memory[f"{part}: memory"] / 2**30, part.split()[-1]
        found.setdefault(f"hetero_attn, plan {plan}", []).append((gib, result["tokens_per_s"]))
        found.setdefault(f"bound of plan {plan}", []).append((gib, result["bound_tokens_per_s"]))
        for label, speed in (("llama.cpp q4_0", _llama(peers, result["name"])),):
            if speed is not None and (gib, speed) not in found.get(label, ()):
                found.setdefault(label, []).append((gib, speed))
    return found


def _peers(results: list[Result]) -> dict[str, Result]:
    """Results of peers by name: recorded ones, and this run's in their place."""
    recorded = [result | {"name": f"peer {result['name']}"} for result in json.loads(RECORD.read_text())["last_run"]]
    return {result["name"]: result for result in (*recorded, *results) if result["name"].startswith("peer ")}


def _beside(speed: float, peer: float | None) -> str:
    return "-" if peer is None else f"{peer:.1f} ({speed / peer:.2f}x)"


def _llama(peers: dict[str, Result], name: str) -> float | None:
    """The best of llama.cpp's figures for the same test under the same cap."""
    part, _, row = name.partition(": ")
    shape, dtype, share = part.split()[1:4] if part.startswith("model ") else ("", "", "")
    wanted = {"n_gen": 32} if row == "decode" else {"n_prompt": int(row[2:] or 0)} if row.startswith("pp") else None
    if wanted is None:
        return None
    rows = peers.get(f"peer llama.cpp {shape} {dtype} {share}", {}).get("rows", ())
    key, value = next(iter(wanted.items()))
    return max((other["avg_ts"] for other in rows if other[key] == value), default=None)


def _accelerate(peers: dict[str, Result], name: str) -> float | None:
    """accelerate's figure in bf16 for as large a share of the weights, under a cap as much larger."""
    part, _, row = name.partition(": ")
    words = part.split()
    field = {"decode": "decode_tokens_per_s", "pp512": "prefill_tokens_per_s"}.get(row)
    if field is None or words[0] != "model":
        return None
    return peers.get(f"peer accelerate {words[1]} bf16 {words[3]}", {}).get(field)


def _hardware(results: list[Result]) -> str:
    machine = next(result for result in results if result["name"] == "machine")
    return f"{machine['gpu']}, {machine.get('cpu', '')}"


if __name__ == "__main__":
    main()
