"""What a run of `gpu_offload.py` found, as a record to keep, a table and a plot.

    python gpu_report.py DIR RECORD.json [--plot PLOT.png]

The record holds every result without timelines; a part that failed stays in it with its error. The table (standard
output, Markdown) puts the bound of each plan first, then what was measured, predicted, and what peers reach under the
same cap. The plot shows decode speed against the GPU memory that was allowed. Needs matplotlib for the plot.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def main() -> None:
    """Read the command line, write the record and the plot, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = read_results(options.directory)
    options.record.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    if options.plot is not None:
        plot(results, options.plot)


def read_results(directory: Path) -> list[Result]:
    """The last line of every name that did not fail, or its failure; without what only a reader of a log wants."""
    last: dict[str, Result] = {}
    for line in (directory / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["name"] in ("start", "end") or (
            "error" in result and "error" not in last.get(result["name"], result)
        ):
            continue
        last[result["name"]] = {key: value for key, value in result.items() if key not in ("trace", "table")}
    return list(last.values())


def table(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown: a row for each test of each share of the weights."""
    yield "| model, share of the weights, test | bound | measured | of bound | predicted | llama.cpp | accelerate |"
    yield "|---|---|---|---|---|---|---|"
    peers = {result["name"]: result for result in results}
    for result in results:
        for row in result.get("rows", ()) if result["name"].startswith(("offload", "depth")) else ():
            bound, speed = row["ceiling_tokens_per_s"], row["tokens_per_s"]
            yield (
                f"| {result['name'].partition(' ')[2]}, {row['name']} | {bound:.1f} | **{speed:.1f}** | {speed / bound:.0%} "
                f"| {row['predicted_tokens_per_s']:.1f} | {_llama(peers, result, row)} | {_accelerate(peers, result, row)} |"
            )


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
    """(GiB, tokens/s) of decode at context 1k by what ran."""
    found: dict[str, list[tuple[float, float]]] = {}
    peers = {result["name"]: result for result in results}
    for result in results:
        if not (result["name"].startswith("offload") and "rows" in result):
            continue
        row, dtype, gib = result["rows"][0], result["name"].split()[2], result["gpu_memory"] / 2**30
        found.setdefault(f"hetero_attn {dtype}", []).append((gib, row["tokens_per_s"]))
        found.setdefault(f"bound of its plan, {dtype}", []).append((gib, row["ceiling_tokens_per_s"]))
        for label, speed in (
            ("llama.cpp q4_0", _llama(peers, result, row)),
            ("accelerate bf16", _accelerate(peers, result, row)),
        ):
            if speed != "-":
                found.setdefault(label, []).append((gib, float(speed.split()[0])))
    return found


def _llama(peers: dict[str, Result], result: Result, row: Result) -> str:
    """The best of llama.cpp's figures for the same test under the same cap, and this runtime's ratio to it."""
    what, shape, dtype, share = result["name"].split()[:4]
    peer = peers.get(f"llama.cpp {'depth ' * (what == 'depth')}{shape} {dtype} {share}", {})
    is_decode, depth, tokens = row["name"].startswith("tg"), int(row["name"].partition("@ d")[2] or 0), _tokens(row)
    speeds = [
        other["avg_ts"]
        for other in peer.get("rows", ())
        if other["n_depth"] == depth and other["n_gen" if is_decode else "n_prompt"] == tokens
    ]
    return f"{max(speeds):.1f} ({row['tokens_per_s'] / max(speeds):.2f}x)" if speeds else "-"


def _tokens(row: Result) -> int:
    return int(row["name"][2:].split()[0])


def _accelerate(peers: dict[str, Result], result: Result, row: Result) -> str:
    words = result["name"].split()
    peer = peers.get(f"accelerate {words[1]} {words[2]} {words[3]}", {})
    speed = {"tg": peer.get("decode_tokens_per_s"), "pp": peer.get("prefill_tokens_per_s")}[row["name"][:2]]
    if speed is None or result["name"].startswith("depth") or row["name"] == "pp4096":
        return "-"
    return f"{speed:.2f} ({row['tokens_per_s'] / speed:.1f}x)"


def _hardware(results: list[Result]) -> str:
    machine = next(result for result in results if result["name"] == "machine")
    return f"{machine['gpu']}, {machine.get('cpu', '')}"


if __name__ == "__main__":
    main()
