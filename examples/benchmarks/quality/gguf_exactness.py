"""A model in GGUF types as llama.cpp makes them, beside transformers holding the same values in float32.

    python examples/benchmarks/quality/gguf_exactness.py FILE.gguf ... [--json FILE] [--windows N]
        [--llama-python PYTHON]

For every file: perplexity of six windows of 512 tokens, or of N, of the shipped checkpoint's held-out text, each read
on its own; the largest error of a logit over the first window; and 64 greedy tokens after a prompt, token by token.
Ours is measured twice: with float32 arithmetic, which is to give transformers' numbers, and as it runs by default, on
packed codes with activations rounded to int8, whose difference is what that rounding costs. transformers reads the file
itself, with `gguf`. Float32 rounds: the yardstick is transformers' own code in float64 throughout, from which both
are measured. --llama-python, an interpreter with llama-cpp-python, adds llama.cpp's perplexity of the same tokens.
Results of files that the JSON file holds already are kept. Last comes a line of JSON.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ending import ended, keep
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from hetero_attn import LLM, SamplingParams
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.tools.quality import MOST_WINDOWS, WINDOW_TOKENS
from placement.machine.fingerprint import cpu_name

TEXT = Path(__file__).resolve().parents[2] / "tiny" / "heldout.txt"
PROMPT = "The largest planets of the solar system are"
GREEDY_TOKENS = 64

# Runs in the other interpreter: a file; tokens of all windows on its input; prints the perplexity.
LLAMA = """
import json, sys, llama_cpp, numpy as np
windows, losses = json.load(sys.stdin), []
longest = max(map(len, windows))
model = llama_cpp.Llama(sys.argv[1], n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, n_threads=2)
for window in windows:
    model.reset()
    model.eval(window)
    for row, token in zip(model.scores[: len(window) - 1], window[1:]):
        row = row.astype(np.float64)
        losses.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[token])
print(np.exp(np.mean(losses)))
"""
LLAMA_CPP = "llama_cpp_perplexity"
NEEDED = "largest_error_of_transformers"  # rows without it are of an older script

Windows = list[list[int]]
Logits = Callable[[list[int]], torch.Tensor]


def perplexity(logits: Logits, windows: Windows) -> float:
    """Of windows that are read each on its own, every token given."""
    losses: list[float] = []
    for window in windows:
        logs = torch.log_softmax(logits(window)[:-1].double(), -1)
        losses += (-logs.gather(1, torch.tensor(window[1:])[:, None])[:, 0]).tolist()
    return math.exp(math.fsum(losses) / len(losses))


def windows_of(tokenizer: Tokenizer, count: int) -> Windows:
    """The text's tokens, so many windows of them."""
    ids = tokenizer.encode(TEXT.read_text())[: count * WINDOW_TOKENS]
    return [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]


def llama_perplexity(python: str, file: Path, windows: Windows) -> float:
    """Of the same windows by llama.cpp as it runs by default."""
    run = subprocess.run([python, "-c", LLAMA, file], input=json.dumps(windows), capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(run.stdout.split()[-1])


def ours(file: Path, dtype: str, count: int) -> tuple[dict[str, Any], Windows, torch.Tensor]:
    """(what is compared, the windows, the logits of the first)."""
    with LLM(file, device="cpu", dtype=dtype, kv_dtype="fp32", max_context=WINDOW_TOKENS, progress=False) as llm:
        windows = windows_of(llm.tokenizer, count)
        prompt = llm.tokenizer.encode(PROMPT)
        answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True))[0]
        found = {"perplexity": perplexity(llm.logits, windows), "prompt": prompt, "greedy": list(answer.token_ids)}
        return found, windows, llm.logits(windows[0])


class Float64(TorchFunctionMode):
    """Every float32 that a model's code asks for by name is float64: of norms, softmax and rotary angles."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {key: wide(value) for key, value in (kwargs or {}).items()}
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wide, args), **named)


def loaded(file: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a file, computing in a dtype."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(dtype).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{file}: transformers lacks {missing} and does not know {unknown}")
    return model


def theirs(file: Path, windows: Windows, prompt: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
    """The same of transformers in float32."""
    model = loaded(file, torch.float32)

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0]

    with torch.inference_mode():
        grown = model.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS, do_sample=False
        )
    return {"perplexity": perplexity(logits, windows), "greedy": grown[0, len(prompt) :].tolist()}, logits(windows[0])


def yardstick(file: Path, window: list[int]) -> torch.Tensor:
    """The logits of a window by transformers in float64."""
    with Float64(), torch.inference_mode():
        return loaded(file, torch.float64)(torch.tensor([window])).logits[0]


def measured(file: Path, count: int) -> dict[str, Any]:
    """One row of the table, over so many windows."""
    exact, windows, logits = ours(file, "fp32", count)
    wanted, wanted_logits = theirs(file, windows, exact["prompt"])
    packed, _, packed_logits = ours(file, "auto", count)
    true = yardstick(file, windows[0])
    largest = true.abs().max().item()
    return {
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "tokens": sum(map(len, windows)),
        "transformers_perplexity": wanted["perplexity"],
        "perplexity": exact["perplexity"],
        "largest_logit_error": _largest(logits, wanted_logits),
        "nmse": _nmse(logits, wanted_logits),
        "largest_logit": largest,
        "largest_error_of_ours": _largest(logits, true),
        NEEDED: _largest(wanted_logits, true),
        "share_of_largest_logit": _largest(logits, true) / largest,
        "nmse_of_ours": _nmse(logits, true),
        "nmse_of_transformers": _nmse(wanted_logits, true),
        "greedy_tokens_equal": _equal(exact["greedy"], wanted["greedy"]),
        "packed_perplexity": packed["perplexity"],
        "packed_nmse": _nmse(packed_logits, wanted_logits),
        "packed_greedy_tokens_equal": _equal(packed["greedy"], wanted["greedy"]),
    }


def _largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (found.double() - wanted.double()).abs().max().item()


def _nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.double()
    return ((found.double() - wanted).square().sum() / wanted.square().sum()).item()


def _equal(found: list[int], wanted: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next(
        (index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]), len(wanted)
    )


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--windows", type=int, choices=range(1, MOST_WINDOWS + 1), default=MOST_WINDOWS)
    chosen = parser.parse_args()
    kept = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {"rows": []}
    result = {"cpu": cpu_name(), "text": TEXT.name, "rows": kept["rows"]}
    print(f"{'':<22}{'perplexity':>18}{'greatest error':>26}{'same':>8}{'packed':>8}")
    print(f"{'file':<22}{'theirs':>9}{'ours':>9}{'theirs':>9}{'ours':>9}{'share':>8}{'':>8}{'':>8}{'same':>5}")
    for file in chosen.files:
        row = next((row for row in result["rows"] if row["file"] == file.name and NEEDED in row), None)
        if row is None:
            row = measured(file, chosen.windows)
            result["rows"] = [*(other for other in result["rows"] if other["file"] != file.name), row]
        if chosen.llama_python and LLAMA_CPP not in row:
            windows = windows_of(Tokenizer.open(file), row["tokens"] // WINDOW_TOKENS)
            row[LLAMA_CPP] = llama_perplexity(chosen.llama_python, file, windows)
        keep(result, chosen.json)
        print(
            f"{row['file'].removesuffix('.gguf'):<22}{row['transformers_perplexity']:>9.4f}{row['perplexity']:>9.4f}"
            f"{row[NEEDED]:>9.1e}{row['largest_error_of_ours']:>9.1e}{row['share_of_largest_logit']:>8.1e}"
            f"{row['greedy_tokens_equal']:>8}{row['packed_perplexity']:>8.3f}{row['packed_greedy_tokens_equal']:>5}"
            + (f"  llama.cpp {row[LLAMA_CPP]:.3f}" if LLAMA_CPP in row else ""),
            flush=True,
        )
    return ended(result, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
