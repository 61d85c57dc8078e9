"""What rounding a trained model's weights costs: ours by recipe, and llama.cpp's own files, on one text.

    python examples/benchmarks/quality/quality.py MODEL [--dtypes q4,q4_m,q8] [--json FILE]
        [--llama-python PYTHON --gguf FILE ...]

MODEL is a checkpoint in safetensors; the text is the held-out text of the shipped one. Perplexity is over windows of
512 tokens, each read on its own. `--llama-python` is an interpreter that has llama-cpp-python, which is not needed
otherwise; the GGUF files are of the same model, as made by llama.cpp. Last comes a line of JSON.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ending import ended

from hetero_attn.planning.options import LoadOptions
from hetero_attn.tools import quality

TEXT = Path(__file__).resolve().parents[2] / "tiny" / "heldout.txt"
# Runs in the other interpreter: a file, the text, tokens of a window, windows; prints the perplexity.
LLAMA = """
import sys, llama_cpp, numpy as np
path, text, size, count = sys.argv[1], open(sys.argv[2]).read(), int(sys.argv[3]), int(sys.argv[4])
model = llama_cpp.Llama(path, n_ctx=size, n_batch=size, logits_all=True, verbose=False, n_threads=2)
ids = model.tokenize(text.encode(), add_bos=False)[: size * count]
losses = []
for start in range(0, len(ids), size):
    window = ids[start : start + size]
    model.reset()
    model.eval(window)
    rows = model.scores[: len(window) - 1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    losses += [-row[token] for row, token in zip(rows, window[1:])]
print(np.exp(np.mean(losses)))
"""


def llama_perplexity(python: str, file: Path) -> float:
    """Perplexity of the text by llama.cpp."""
    arguments = [str(file), str(TEXT), str(quality.WINDOW_TOKENS), str(quality.MOST_WINDOWS)]
    run = subprocess.run([python, "-c", LLAMA, *arguments], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtypes", default="q4,q4_m,q8")
    parser.add_argument("--llama-python")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.gguf and not chosen.llama_python:
        parser.error("--gguf needs --llama-python, an interpreter that has llama-cpp-python")
    wishes = LoadOptions(model=chosen.model, device="cpu")
    report = quality.run(wishes, TEXT.read_text(), chosen.dtypes.split(","))
    print(report.table())
    theirs = []
    for file in chosen.gguf:
        found = llama_perplexity(chosen.llama_python, file)
        theirs.append({"file": file.name, "file_bytes": file.stat().st_size, "perplexity": found})
        print(f"llama.cpp {file.name:<26}{file.stat().st_size / 2**20:>9.1f} MiB{found:>10.3f}")
    result = {"text": TEXT.name, "ours": report.to_dict(), "llama_cpp": theirs}
    return ended(result, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
