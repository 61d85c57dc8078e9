"""What drafts gain on a model: the ceiling first, then decoding with drafts beside decoding without, in turns.

    python examples/benchmarks/speculation.py [MODEL] [--drafts ngram oracle:0 oracle:0.8] [--draft MODEL] [--json]
        [--texts repeats prose] [--twin MODEL] [--llama-python PYTHON --llama-model FILE.gguf]

Every answer is compared with the plain one. `oracle:SHARE` drafts the answer's own tokens, each right with a
probability; with --twin they are right where n-grams are right about that model's answer. With --llama-python, an
interpreter that has llama_cpp, llama.cpp decodes the repetitive prompt beside ours: plain, with its prompt lookup, and
with the same oracle; its gain is over its own plain decoding. Gains of wall time and of processor time are reported; on
a shared machine these ratios alone mean something.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hetero_attn import LLM
from hetero_attn.tools.drafts.passes import pass_times
from hetero_attn.tools.drafts.report import TEXTS_DEPTH, DraftsReport, needed_tokens
from hetero_attn.tools.drafts.runs import TEXTS, Text, acceptance_of, measure, prompt_of, text_of
from placement.machine.fingerprint import cpu_name

TINY = Path(__file__).resolve().parents[1] / "tiny"
LLAMA_COUNT = 7  # drafts a pass, as ours has at eight rows; its own default of 10 is slower here


class Llama:
    """llama.cpp in a process of its own, see sides/lookup_peer.py."""

    def __init__(self, python: str, model: str, threads: int) -> None:
        script = Path(__file__).with_name("sides") / "lookup_peer.py"
        command = [python, str(script), model, "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, prompt: list[int], tokens: int, drafts: str | float | None, seed: int) -> dict:
        """Seconds and tokens of one answer. seed: of an oracle's draws."""
        request = {"prompt": prompt, "tokens": tokens, "drafts": drafts, "count": LLAMA_COUNT, "seed": seed}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def llama_rows(llama: Llama, text: str, prompt: list[int], wishes: argparse.Namespace) -> list[dict]:
    """llama.cpp's gains over its own plain decoding; an answer with drafts may differ from the plain one there."""
    kinds = {"plain": None, "ngram": "lookup"}
    kinds |= {wish: acceptance_of(wish) for wish in wishes.drafts if acceptance_of(wish) is not None}
    runs: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for turn in range(wishes.repetitions + 1):
        for kind, drafts in kinds.items():
            run = llama.ask(prompt, wishes.tokens, drafts, turn)
            if turn:
                runs[kind].append(run)
    return [llama_row(text, kind, runs[kind], runs["plain"]) for kind in kinds]


def llama_row(text: str, kind: str, runs: list[dict], plain: list[dict]) -> dict:
    """One kind of drafts beside none, turn by turn."""
    gains = {
        f"{name}gain": statistics.median(other[unit] / run[unit] for run, other in zip(runs, plain, strict=True))
        for name, unit in (("", "seconds"), ("cpu_", "cpu_seconds"))
    }
    made = len(runs[0]["token_ids"]) - 1
    same = all(run["token_ids"] == plain[0]["token_ids"] for run in runs)
    rate = made / statistics.median(run["seconds"] for run in runs)
    return {"text": text, "drafts": kind, "tokens_per_s": rate, **gains, "same_tokens": same}


def twin_text(wishes: argparse.Namespace) -> Text | None:
    """What the model of --twin answers to the text that repeats itself; its n-grams are right where it does."""
    if not wishes.twin:
        return None
    context = max(512, needed_tokens(wishes.tokens))
    with LLM(wishes.twin, max_context=context, progress=False, device="cpu", num_threads=wishes.threads) as llm:
        return text_of(llm, "repeats", wishes.tokens)


def measured(wishes: argparse.Namespace) -> tuple[DraftsReport, list[dict]]:
    """Ours and llama.cpp's, text by text."""
    # A prompt that is known already is computed in other chunks, and random weights have many near ties.
    options = {"dtype": wishes.dtype, "device": wishes.device, "num_threads": wishes.threads, "prefix_cache": False}
    context, ours, others = max(512, needed_tokens(wishes.tokens)), [], []
    llama = None
    with LLM(wishes.model, max_context=context, progress=False, speculate=wishes.draft or "off", **options) as llm:
        times = pass_times(llm.planned, llm.engine, TEXTS_DEPTH, wishes.repetitions + 2)
        twin = twin_text(wishes)
        drafts = [*wishes.drafts, *([wishes.draft] if wishes.draft else [])]
        if wishes.llama_python:
            llama = Llama(wishes.llama_python, wishes.llama_model, llm.plan.num_threads)
        for text in wishes.texts:
            own = twin if text == "repeats" else None
            ours += measure(llm, text, drafts, times, wishes.tokens, wishes.repetitions, own)
            if llama is not None and text == "repeats":  # the other answer is drawn, which every program does otherwise
                prompt = prompt_of(llm, text)
                ids = prompt if isinstance(prompt, list) else llm.tokenizer.encode(prompt)
                others += llama_rows(llama, text, ids, wishes)
        name = repr(llm)
    if llama is not None:
        llama.close()
    return DraftsReport(name, times, tuple(ours)), others


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--texts", nargs="*", default=[*TEXTS], choices=[*TEXTS])
    parser.add_argument("--drafts", nargs="*", default=["ngram", "oracle:0", "oracle:0.8"])
    parser.add_argument("--twin", help="a model whose answer says where n-grams are right, for one with random weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft", help="a small model of the same vocabulary, which drafts too")
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp")
    parser.add_argument("--llama-model", help="the GGUF file for it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    wishes = parser.parse_args()
    report, others = measured(wishes)
    record = {"machine": {"cpu": cpu_name()}, "tokens": wishes.tokens, **report.to_dict(), "llama_cpp": others}
    if wishes.out:
        wishes.out.write_text(json.dumps(record) + "\n")
    if wishes.json:
        print(json.dumps(record))
        return
    print(report.table(100))
    if others:
        table = Table("text", "llama.cpp's drafts", "tokens/s", "gain", "of CPU time", "same tokens", box=None)
        for row in others:
            figures = (f"{row[name]:.2f}" for name in ("tokens_per_s", "gain", "cpu_gain"))
            table.add_row(row["text"], row["drafts"], *figures, "yes" if row["same_tokens"] else "no")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
