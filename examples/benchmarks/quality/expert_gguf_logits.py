"""Toy mixtures of experts as GGUF files of float32, their logits by llama.cpp, by transformers and by us.

    python examples/benchmarks/quality/expert_gguf_logits.py --llama-python PYTHON [--json FILE] [--families NAME ...]

The files are those of the tests: every architecture at a few thousand weights, routers drawn so that scores spread, and
all vectors drawn anew so that no default hides a term. The oracle is transformers in float32 on the same values; ours
runs in float32 too, llama.cpp on its CPU with a float32 cache and without flash attention. For each: the squared
error over the squared norm of the logits of 40 tokens, and at how many of them the best token is the same. Where
llama.cpp has no such architecture, or cannot read what the file says, its own words stand in the table. --llama-python
is an interpreter with llama-cpp-python. Last comes a line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # toy files are written by the tests' own code

from ending import ended

from hetero_attn import LLM
from placement.machine.fingerprint import cpu_name
from tests.support.models.delta_gguf import ARCHITECTURES, delta_gguf
from tests.support.models.gemma4_gguf import ARCHITECTURE, gemma4_gguf
from tests.support.models.moe import GGUF_KEYS, moe_gguf, moe_logits

TOKENS = 40
FIRST_TOKEN, VOCAB = 3, 290  # control tokens are no text
# What llama.cpp takes for granted: OLMoE's published models have no fewer heads of K than of Q.
CHANGES = {"olmoe": {"num_key_value_heads": 4}}

# Runs in the other interpreter: a file and where to write; tokens on its input.
LLAMA = """
import json, sys, llama_cpp, numpy as np
tokens = json.load(sys.stdin)
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_threads=2,
                        type_k=0, type_v=0, flash_attn=False, swa_full=True)
model.eval(tokens)
np.save(sys.argv[2], model.scores[: len(tokens)])
print(llama_cpp.__version__)
"""

Write = Callable[[Path], tuple[Path, Path]]


def toys() -> dict[str, tuple[str, Write]]:
    """(llama.cpp's name of the architecture, what writes the file and the same values for transformers) by family."""
    found: dict[str, tuple[str, Write]] = {
        family: (name, lambda folder, family=family: moe_gguf(folder, family, "F32", **CHANGES.get(family, {})))
        for family, (name, _) in GGUF_KEYS.items()
    }
    for family, name in ARCHITECTURES.items():
        found[family] = name, lambda folder, family=family: delta_gguf(folder, family, "F32")
    return found | {"gemma4_text": (ARCHITECTURE, lambda folder: gemma4_gguf(folder, "F32"))}


def with_vocabulary(file: Path) -> Path:
    """The file as llama.cpp reads it: with a token for every row of the embedding, and a merge. Ours needs neither, and
    tokens are given as numbers here."""
    reader, keys = gguf.GGUFReader(file), gguf.Keys.Tokenizer
    if keys.MERGES in reader.fields:
        return file
    rows = next(tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tokens, kinds = (reader.fields[key].contents() for key in (keys.LIST, keys.TOKEN_TYPE))
    more = range(len(tokens), rows)
    array, text, number = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, gguf.GGUFValueType.INT32
    changes = {
        keys.LIST: MetadataDetails(array, [*tokens, *(f"<{index}>" for index in more)], sub_type=text),
        keys.TOKEN_TYPE: MetadataDetails(array, [*kinds, *(1 for _ in more)], sub_type=number),
        keys.MERGES: MetadataDetails(array, ["a b"], sub_type=text),
    }
    target = file.with_name("vocabulary.gguf")
    writer = gguf.GGUFWriter(target, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_with_new_metadata(reader, writer, changes, ())
    return target


def of_llama_cpp(python: str, file: Path, tokens: list[int]) -> torch.Tensor:
    """Logits by llama.cpp; RuntimeError holds what it says instead."""
    import numpy as np

    at = file.with_suffix(".npy")
    run = subprocess.run([python, "-c", LLAMA, file, at], input=json.dumps(tokens), capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(why(python, file) or run.stderr.strip().splitlines()[-1])
    return torch.from_numpy(np.load(at))


def why(python: str, file: Path) -> str:
    """llama.cpp's line about a file that it does not load."""
    code = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], verbose=True)"
    said = subprocess.run([python, "-c", code, file], capture_output=True, text=True).stderr
    lines = [line for line in said.splitlines() if "error loading model" in line]
    return lines[0].partition("error loading model: ")[2].partition(": /")[0] if lines else ""


def of_ours(file: Path, tokens: list[int]) -> torch.Tensor:
    """Logits by us, nothing rounded."""
    with LLM(file, device="cpu", dtype="fp32", kv_dtype="fp32", max_context=64, progress=False) as llm:
        return llm.logits(tokens)


def compared(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """How far logits are from others."""
    wanted = wanted.double()
    error = ((found.double() - wanted).square().sum() / wanted.square().sum()).item()
    return {"nmse": error, "best_tokens_alike": int((found.argmax(-1) == wanted.argmax(-1)).sum())}


def measured(family: str, name: str, write: Write, python: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    tokens = torch.randint(FIRST_TOKEN, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    file, plain = write(folder)
    wanted, ours = moe_logits(plain, tokens), of_ours(file, tokens)
    row = {"family": family, "architecture": name, "tokens": TOKENS, "ours_to_transformers": compared(ours, wanted)}
    try:
        theirs = of_llama_cpp(python, with_vocabulary(file), tokens)
    except RuntimeError as error:
        return row | {"llama_cpp": str(error)}
    return row | {
        "llama_cpp_to_transformers": compared(theirs, wanted),
        "llama_cpp_to_ours": compared(theirs, ours),
    }


def line_of(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    ours = f"{row['family']:<18}{row['ours_to_transformers']['nmse']:>12.1e}"
    if "llama_cpp" in row:
        return f"{ours}  llama.cpp: {row['llama_cpp']}"
    pairs = row["llama_cpp_to_transformers"], row["llama_cpp_to_ours"]
    return ours + "".join(f"{pair['nmse']:>12.1e}{pair['best_tokens_alike']:>4}/{TOKENS}" for pair in pairs)


def main() -> int:
    """Measure and print; returns the exit code."""
    known = toys()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--families", nargs="+", choices=known, default=list(known))
    chosen = parser.parse_args()
    result: dict[str, Any] = {"cpu": cpu_name(), "rows": []}
    print(f"{'':<18}{'ours':>12}{'llama.cpp':>19}{'llama.cpp':>19}")
    print(f"{'family':<18}{'to theirs':>12}{'to theirs':>19}{'to ours':>19}")
    for family in chosen.families:
        with tempfile.TemporaryDirectory() as folder:
            result["rows"].append(measured(family, *known[family], chosen.llama_python, Path(folder)))
        print(line_of(result["rows"][-1]), flush=True)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    run = subprocess.run([chosen.llama_python, "-c", version], capture_output=True, text=True, check=True)
    result["llama_cpp_python"] = run.stdout.strip()
    return ended(result, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
