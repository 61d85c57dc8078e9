"""Decoding with drafts beside decoding without, in turns, on this machine.

    python examples/benchmarks/speculation.py [MODEL] [--draft MODEL] [--tokens 96] [--acceptance 0 0.8] [--json]

For each kind of text the n-gram drafter, and a drafter that knows the answer and drafts the right token with a given
probability, so that the gain of an acceptance can be seen whatever the model. Every answer is checked against the plain
one. Gains of wall time and of processor time are reported; on a shared machine these ratios alone mean something.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hetero_attn import LLM, SamplingParams
from hetero_attn.speculation.speculator import NgramDrafter, Speculator

TINY = Path(__file__).resolve().parents[1] / "tiny"
TEXTS = {
    "repeats": "The list of names:\n" + "".join(f"    name_{number % 3} = value_{number % 3}\n" for number in range(9)),
    "prose": "When the module was first written nobody had thought of threads, and so",
}


class Knowing:
    """Drafts the plain answer's tokens, each right with a probability and else another one."""

    def __init__(self, answer: tuple[int, ...], acceptance: float) -> None:
        self._answer, self._acceptance, self._draw = answer, acceptance, random.Random(0)

    def draft(self, prompt_ids: object, generated_ids: list[int], count: int) -> list[int]:
        """See hetero_attn.speculation.speculator.Drafter."""
        right = self._answer[len(generated_ids) : len(generated_ids) + count]
        return [token_id if self._draw.random() < self._acceptance else (token_id + 1) % 100 for token_id in right]

    def close(self) -> None:
        """As `Drafter`; it holds nothing."""


def timed(llm: LLM, prompt: str | list[int], params: SamplingParams, speculator: Speculator | None) -> dict:
    """One generation under a speculator: its output, seconds of decoding and of processors."""
    llm._scheduler.speculator = speculator  # LLM(speculate=) loads a model anew
    began = time.process_time()
    output = llm.generate(prompt, params)[0]
    return {"output": output, "wall_s": output.metrics.decode_s, "cpu_s": time.process_time() - began}


def measure(llm: LLM, text: str, wishes: argparse.Namespace, draft_model: Speculator | None) -> list[dict]:
    """Rows of the table for one text."""
    params = SamplingParams(temperature=0.0, max_tokens=wishes.tokens, ignore_eos=True)
    # Without a tokenizer bytes stand for tokens: speed needs no sense.
    prompt = TEXTS[text] if llm.tokenizer is not None else list(TEXTS[text].encode())
    answer = timed(llm, prompt, params, None)["output"].token_ids
    kinds = {"n-gram": NgramDrafter}
    kinds |= {f"acceptance {share:g}": lambda share=share: Knowing(answer, share) for share in wishes.acceptance}
    made = {kind: Speculator(llm.report(), drafter) for kind, drafter in kinds.items()}
    if draft_model is not None:
        made["draft model"] = draft_model
    runs: dict[str, list[dict]] = {kind: [] for kind in ("plain", *made)}
    for turn in range(wishes.repetitions + 1):
        for kind in runs:
            run = timed(llm, prompt, params, made.get(kind))
            assert run["output"].token_ids == answer, f"{kind}: another answer"
            if turn:  # the first turn records passes of every width
                runs[kind].append(run)
    return [row(text, kind, runs[kind], runs["plain"]) for kind in runs]


def row(text: str, kind: str, runs: list[dict], plain: list[dict]) -> dict:
    """One kind of drafts beside none, turn by turn."""
    metrics = [run["output"].metrics for run in runs]
    drafted, accepted = (sum(getattr(m, name) for m in metrics) for name in ("drafted_tokens", "accepted_tokens"))
    gains = {
        unit: statistics.median(other[unit] / run[unit] for run, other in zip(runs, plain, strict=True))
        for unit in ("wall_s", "cpu_s")
    }
    return {
        "text": text,
        "drafts": kind,
        "tokens_per_s": statistics.median(m.decode_tokens_per_s for m in metrics),
        "gain_wall": gains["wall_s"],
        "gain_cpu": gains["cpu_s"],
        "right": accepted / drafted if drafted else None,
        "drafted": drafted,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.0, 0.8])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft", help="a small model of the same vocabulary, which drafts too")
    parser.add_argument("--json", action="store_true")
    wishes = parser.parse_args()
    # A prompt that is known already is computed in other chunks, and random weights have many near ties.
    options = {"dtype": wishes.dtype, "device": wishes.device, "num_threads": wishes.threads, "prefix_cache": False}
    with LLM(wishes.model, max_context=512, progress=False, speculate=wishes.draft or "off", **options) as llm:
        draft_model = llm._scheduler.speculator
        rows = [row for text in TEXTS for row in measure(llm, text, wishes, draft_model)]
        llm._scheduler.speculator = draft_model  # closed with the model
        name = repr(llm)
    if wishes.json:
        print(json.dumps({"model": name, "rows": rows}))
        return
    table = Table(*("text", "drafts", "tokens/s", "gain", "gain of CPU time", "right", "drafted"), title=name, box=None)
    for each in rows:
        right = "" if each["right"] is None else f"{each['right']:.0%}"
        figures = (f"{each['tokens_per_s']:.0f}", f"{each['gain_wall']:.2f}", f"{each['gain_cpu']:.2f}", right)
        table.add_row(each["text"], each["drafts"], *figures, str(each["drafted"]))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
