"""What answers in a form cost: CPU time of a grammar's mask for each token, beside that of the step it is for.

    python examples/benchmarks/server/masks.py [MODEL] [--step-ms MS ...] [--out FILE]

Answers are drawn at random from what a schema allows, so that every state of the grammar is met. `forced` asks what is
left no choice, `asked` whether one token is allowed: that is all where the token that is drawn first is. `mask` finds
out all that is allowed and `apply` takes the others from the logits, where it is refused; the shares of a step are
those of a draw that always is. The aim is 2 % of a step, which is measured on MODEL and can be given for others. CPU
time of this thread, so that a busy machine does not count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hetero_attn import LLM, SamplingParams
from hetero_attn.errors import SamplingError

WORDS = {"type": "string", "maxLength": 30}
PERSON = {
    "type": "object",
    "properties": {
        "name": WORDS,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": WORDS, "minItems": 1, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": WORDS, "number": {"type": "number"}, "country": {"enum": ["FR", "DE", "IT"]}},
            "required": ["street", "number", "country"],
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
FORMS = {
    "schema": {"json_schema": PERSON},
    "any object": {"json_schema": {"type": "object"}},
    "regex": {"regex": r"(\d{4}-\d{2}-\d{2} [a-z ]{3,20}\n){1,5}"},
}
MOST_TOKENS = 120


def microseconds(work: Callable[..., object], *arguments: object) -> float:
    """CPU time of a call."""
    begin = time.thread_time()
    work(*arguments)
    return 1e6 * (time.thread_time() - begin)


def left(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The logits of what is allowed, as the sampler takes them."""
    return logits.index_select(0, torch.from_numpy(np.flatnonzero(allowed.numpy())))


def followed(llm: LLM, wish: dict, seed: int) -> list[tuple[float, float, float, float]]:
    """Microseconds of forced, asked, mask and apply for each token of one random answer."""
    mask, draw = llm.grammars.mask(SamplingParams(**wish)), torch.Generator().manual_seed(seed)
    logits, ids, times = torch.zeros(llm.engine.config.vocab_size), [], []
    while len(ids) < MOST_TOKENS and (not ids or ids[-1] not in llm.tokenizer.eos_token_ids):
        try:
            forced = microseconds(mask.forced, ids)
            asked = microseconds(mask.which, ids, [0])
            computed = microseconds(mask.allowed, ids)
        except SamplingError:  # a stop token of the model's config that no grammar knows
            break
        allowed = mask.allowed(ids)
        applied = microseconds(left, logits, allowed)
        times.append((forced, asked, computed, applied))
        choices = allowed.nonzero().flatten()
        ids.append(int(choices[torch.randint(len(choices), (), generator=draw)]))
    return times


def step_ms(llm: LLM, tokens: int = 24) -> float:
    """Median CPU time of the process in a step that makes one token."""
    request = llm.add("A list is", SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0))
    times = []
    while request.finish_reason is None:
        begin = time.process_time()
        llm.step()
        times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times[4:])


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(Path(__file__).resolve().parents[2] / "tiny"))
    parser.add_argument("--step-ms", type=float, nargs="*", default=[])
    parser.add_argument("--answers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with LLM(given.model, device="cpu", num_threads=1, max_context=512, max_batch=1, progress=False) as llm:
        steps = [step_ms(llm), *given.step_ms]
        vocabulary = llm.engine.config.vocab_size
        print(f"{llm.plan.model}: {vocabulary} tokens, a step takes {steps[0]:.2f} ms of CPU")
        found = {}
        for name, wish in FORMS.items():
            followed(llm, wish, 99)
            times = [each for seed in range(given.answers) for each in followed(llm, wish, seed)]
            forced, asked, mask, applied = (statistics.mean(column) for column in zip(*times, strict=True))
            worst, all_us = max(map(sum, times)), forced + asked + mask + applied
            shares = ", ".join(f"{all_us / 10 / step:.2f} % of {step:.1f} ms" for step in steps)
            names = ("forced_us", "asked_us", "mask_us", "apply_us", "worst_us")
            found[name] = dict(zip(names, (forced, asked, mask, applied, worst), strict=True))
            print(f"{name}: " + ", ".join(f"{part[:-3]} {us:.0f} us" for part, us in found[name].items()), shares)
    record = {"benchmark": "masks", "model": llm.plan.model, "vocab_size": vocabulary, "step_ms": steps, "forms": found}
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
