"""llama.cpp with drafts, through llama-cpp-python, in a process of its own: driven by lines like peers.py.

    python examples/benchmarks/sides/lookup_peer.py MODEL.gguf --threads N

Each line of standard input is a JSON object {"prompt": [token ids], "tokens": N, "drafts": null | "lookup" | a
probability, "count": drafts a pass, "seed": of the draws}; each line of standard output answers {"seconds": of decoding
behind the first token, "cpu_seconds", "token_ids"}. A probability drafts the plain answer's own tokens, each right so
often and else another one, drawn as hetero_attn.speculation.oracle draws them; "lookup" is LlamaPromptLookupDecoding.
Decoding is greedy, and ends after N tokens. Needs llama_cpp and the standard library alone.
"""

import argparse
import json
import random
import sys
import time

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

CONTEXT = 1024  # tokens of a prompt and its answer


class Oracle(LlamaDraftModel):
    """Drafts a known answer behind a prompt."""

    def __init__(self, request: dict, answer: list[int], vocab_size: int) -> None:
        self._prompt, self._answer, self._acceptance = len(request["prompt"]), answer, request["drafts"]
        self._count, self._vocab_size, self._draw = request["count"], vocab_size, random.Random(request["seed"])

    def __call__(self, input_ids, /, **kwargs):
        """See LlamaDraftModel."""
        made = len(input_ids) - self._prompt
        right = self._answer[made : made + self._count]
        drafts = [each if self._draw.random() < self._acceptance else (each + 1) % self._vocab_size for each in right]
        return np.array(drafts, dtype=np.intc)


class Peer:
    """A model loaded once with room for logits of every row, as drafts ask for, and once without."""

    def __init__(self, model: str, threads: int) -> None:
        # Its table of logits has a row for each token of a batch: a longer prompt would not fit.
        wishes = {"model_path": model, "n_ctx": CONTEXT, "n_batch": CONTEXT}
        wishes |= {"n_threads": threads, "n_threads_batch": threads}
        wishes |= {"n_gpu_layers": 0, "verbose": False}
        self._plain = Llama(**wishes)
        self._drafting = Llama(**wishes, draft_model=LlamaPromptLookupDecoding())
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def answer(self, request: dict) -> dict:
        """Generate once."""
        prompt, tokens, drafts = request["prompt"], request["tokens"], request["drafts"]
        llama = self._plain if drafts is None else self._drafting
        if drafts == "lookup":
            llama.draft_model = LlamaPromptLookupDecoding(num_pred_tokens=request["count"])
        elif drafts is not None:
            known = self._answers[tuple(prompt)]
            llama.draft_model = Oracle(request, known, llama.n_vocab())
        llama.reset()
        token_ids: list[int] = []
        for token_id in llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            token_ids.append(token_id)
            if len(token_ids) == 1:
                began, cpu_began = time.perf_counter(), time.process_time()
            if len(token_ids) == tokens:
                break
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        if drafts is None:
            self._answers[tuple(prompt)] = token_ids
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "token_ids": token_ids}


def main() -> None:
    """Load and serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    wishes = parser.parse_args()
    peer = Peer(wishes.model, wishes.threads)
    for line in sys.stdin:
        print(json.dumps(peer.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
