"""What a file of a size costs in quality: KL divergence and perplexity over bits, of our files and of llama.cpp's.

    python examples/benchmarks/quality/quality_curve.py MODEL --work DIR --json FILE [--plot FILE.svg]
        [--calibrate TEXT] [--types Q4_0,... --full FULL.gguf --llama-python PYTHON] [--bits 4.6,...]
        [--recipes q4_m,...] [--windows 6] [--no-text]

MODEL is the unquantised model, FULL the same as a GGUF file that llama.cpp quantises to each of --types, by default
without an importance matrix. Of each of those sizes, and of --bits, `hetero-attn quantize` makes a file with no more
bits a weight (one for sizes within 1 %), for the calibration text: without one, the text of `tiny_corpus.py` that is
not held out; with --no-text by what types usually cost. All files are read by this project and computed in float32, on
windows of 512 tokens of the held-out text, each read on its own; KL is of the unquantised model's distribution to the
file's, natural log, mean over positions. Files and results that are there already are kept, so a run that was broken
off goes on. Last comes a line of JSON.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import ended, keep

from hetero_attn import LLM
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.tools.quality import WINDOW_TOKENS
from hetero_attn.tools.quantize.choose import RECIPES, Loss
from hetero_attn.tools.quantize.layer_runs import cut, layer_runs
from hetero_attn.tools.quantize.table import KEY
from hetero_attn.tools.quantize.write import quantize
from placement.machine.fingerprint import cpu_name

EXAMPLES = Path(__file__).resolve().parents[2]
TEXT = EXAMPLES / "tiny" / "heldout.txt"
SAME_SIZE = 0.01  # a file that is so little smaller stands for the size too
CALIBRATION_DOCUMENTS, CALIBRATION_CHARACTERS = 40, 1600
# Runs in the interpreter that has llama-cpp-python: the full file, the file to make, the name of its type.
LLAMA = """
import sys, llama_cpp
full, out, name = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread, params.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), 2, True
sys.exit(llama_cpp.llama_model_quantize(full.encode(), out.encode(), params))
"""


def calibration_text() -> str:
    """The beginnings of documents, evenly spread, of what every CPython carries, without the held-out ones."""
    sys.path.insert(0, str(EXAMPLES))
    from tiny_corpus import gather_documents, split_documents

    documents, _ = gather_documents(None)
    names = [name for name in split_documents(documents)[0] if len(documents[name]) > CALIBRATION_CHARACTERS]
    chosen = names[:: max(1, len(names) // CALIBRATION_DOCUMENTS)]
    return "\n\n".join(documents[name][:CALIBRATION_CHARACTERS] for name in chosen)


def bits_of(file: Path) -> float:
    """Bits a weight of the matrices of a GGUF file."""
    with GgufCheckpoint.open(file) as source:
        matrices = [name for name in source.names if len(source.shape(name)) > 1]
        nbytes = sum(source.row_bytes(name) * source.shape(name)[0] for name in matrices)
        return 8 * nbytes / sum(math.prod(source.shape(name)) for name in matrices)


def known_losses(folder: Path) -> dict[str, Loss] | None:
    """What the weights cost by a file that was made of the same model before; None where there is none."""
    for file in sorted(folder.glob("ours-*-bits.gguf")):
        with GgufCheckpoint.open(file) as source:
            entries = json.loads(source.fields.values[KEY])["tensors"]
            known = {name: Loss(*source.shape(name), entry["kl"]) for name, entry in entries.items() if "kl" in entry}
        if known:
            return known
    return None


def log_probabilities(model: Path, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the windows, log-probabilities float32 [windows * tokens, vocab_size] of what follows each of their tokens)."""
    size = WINDOW_TOKENS
    with LLM(
        model, device="cpu", dtype="fp32", kv_dtype="fp32", max_context=size, max_batch=windows, progress=False
    ) as llm:
        ids = cut(llm.tokenizer.encode(TEXT.read_text()), size, windows)
        with layer_runs(llm.engine, ids, windows, llm.plan.num_threads) as runs:
            hidden = runs.embedded()
            for layer in range(runs.layers):
                hidden = runs.after_layer(layer, hidden)
            return ids, torch.cat([runs.log_probabilities(window) for window in hidden])


def measured(file: Path, windows: int, baseline: Path) -> dict[str, float]:
    """Perplexity, KL and agreement of a file against the unquantised model, whose distributions `baseline` holds."""
    ids, found = log_probabilities(file, windows)
    wanted = torch.from_numpy(np.load(baseline, mmap_mode="c"))
    divergence, same = 0.0, 0
    for row, other in zip(found, wanted, strict=True):
        divergence += (other.double().exp() * (other.double() - row.double())).sum().item()
        same += int(row.argmax() == other.argmax())
    rows = ids.numel()
    return {"perplexity": perplexity(ids, found), "mean_kl": max(0.0, divergence / rows), "same_top": same / rows}


def perplexity(ids: torch.Tensor, logs: torch.Tensor) -> float:
    """Of windows [windows, tokens] with the log-probabilities after each token."""
    rows = logs.view(*ids.shape, -1)[:, :-1]
    return math.exp(-rows.gather(2, ids[:, 1:, None]).double().mean().item())


def main() -> int:
    """Make, measure and print; returns the exit code."""
    chosen = arguments()
    chosen.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"rows": []}
    result |= {"cpu": cpu_name(), "text": TEXT.name, "windows": chosen.windows, "window_tokens": WINDOW_TOKENS}
    text = "" if chosen.no_text else chosen.calibrate.read_text() if chosen.calibrate else calibration_text()
    baseline = chosen.work / f"baseline-{chosen.windows}.npy"
    if not baseline.exists():
        ids, logs = log_probabilities(chosen.model, chosen.windows)
        np.save(baseline, logs.numpy())
        result["unquantised_perplexity"] = perplexity(ids, logs)
    for make in todo(chosen, text):
        name, by, file = make[:3]
        if any(row["name"] == name and row["by"] == by for row in result["rows"]):
            continue
        if not file.exists():
            make[3]()
        row = {"name": name, "by": by, "file_bytes": file.stat().st_size, "bits": bits_of(file)}
        result["rows"].append(row | measured(file, chosen.windows, baseline))
        keep(result, chosen.json)
        show(result["rows"][-1])
    if chosen.plot:
        plot(result, chosen.plot, chosen.title)
    return ended(result, chosen.json)


def todo(chosen: argparse.Namespace, text: str) -> list[Any]:
    """(name, whose, file, what makes it) of every file to measure."""
    found: list[Any] = []
    asked: list[float] = []

    def by_bits(name: str, bits: float) -> None:
        if any(bits * (1 - SAME_SIZE) <= other <= bits for other in asked):
            return
        asked.append(bits)
        file = chosen.work / f"ours-{name}-bits.gguf"

        def make() -> None:
            quantize(chosen.model, file, None, bits, text, measured=known_losses(chosen.work))

        found.append((name, "ours", file, make))

    for kind in filter(None, chosen.types.split(",")):
        file = chosen.work / f"llama.cpp-{kind}.gguf"
        if not file.exists():
            command = [chosen.llama_python, "-c", LLAMA, str(chosen.full), str(file), kind]
            subprocess.run(command, check=True, capture_output=True)
        found.append((kind, "llama.cpp", file, None))
    for _, kind in sorted((bits_of(file), kind) for kind, _, file, _ in found):
        by_bits(f"size of {kind}", bits_of(chosen.work / f"llama.cpp-{kind}.gguf"))
    for bits in filter(None, chosen.bits.split(",")):
        by_bits(f"{bits} bits", float(bits))
    for recipe in filter(None, chosen.recipes.split(",")):
        file = chosen.work / f"ours-{recipe}.gguf"
        found.append((recipe, "ours", file, lambda recipe=recipe, file=file: quantize(chosen.model, file, recipe)))
    return found


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['by']:<10}{row['name']:<16}{row['file_bytes'] / 2**20:>8.1f} MiB{row['bits']:>7.3f} bits"
        f"{row['perplexity']:>10.4f}{row['mean_kl']:>11.6f}{row['same_top']:>8.2%}",
        flush=True,
    )


def plot(result: dict[str, Any], path: Path, title: str) -> None:
    """KL over the size of the file, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4))
    for label, (look, rows) in curves(result["rows"]).items():
        rows = sorted(rows, key=lambda row: row["bits"])
        for axes, value in zip(both, ("mean_kl", "perplexity"), strict=True):
            axes.plot([row["file_bytes"] / 1e6 for row in rows], [row[value] for row in rows], look, label=label)
    both[0].set(yscale="log", ylabel="mean KL to the unquantised model")
    both[1].set(ylabel="perplexity")
    for axes in both:
        axes.set(xlabel="file (MB)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """(how they are drawn, rows) by what made the files."""
    theirs = [row for row in rows if row["by"] == "llama.cpp"]
    recipes = [row for row in rows if row["by"] == "ours" and row["name"] in RECIPES]
    by_bits = [row for row in rows if row["by"] == "ours" and row["name"] not in RECIPES]
    found = {"llama.cpp": ("s--", theirs), "quantize --bits": ("o-", by_bits), "quantize --recipe": ("^", recipes)}
    return {label: item for label, item in found.items() if item[1]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--title", default="")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--no-text", action="store_true")
    parser.add_argument("--types", default="")
    parser.add_argument("--full", type=Path)
    parser.add_argument("--llama-python")
    parser.add_argument("--bits", default="")
    parser.add_argument("--recipes", default="")
    parser.add_argument("--windows", type=int, default=6)
    chosen = parser.parse_args()
    if chosen.types and not (chosen.full and chosen.llama_python):
        parser.error("--types needs --full, a GGUF file, and --llama-python, which has llama-cpp-python")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
