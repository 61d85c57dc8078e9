"""A model whose calls come in any order: its prompts, and whether it is at rest."""

from hetero_attn import LLM, Policy, SamplingParams
from tests.support.models.runtime import THREADS

PROMPTS = ["hello", "a longer prompt, of several chunks", "x", "héllo wörld", "(self, name, **kw)"]
DEVICES = {"cpu": {"device": "cpu"}, "emulated": {"device": "emulated", "gpu_memory": "700KiB"}}


def greedy(max_tokens=8):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def load(path, device="cpu", **options):
    options = {"max_batch": 3, "page_size": 4, "num_threads": THREADS, "policy": Policy(prefill_chunk=16)} | options
    return LLM(path, dtype="fp32", progress=False, **DEVICES[device], **options)


def joined(pieces):
    return "".join(piece.text for piece in pieces), sum((piece.token_ids for piece in pieces), ())


def is_at_rest(llm):
    """Whether nothing waits, runs or holds a place."""
    llm.step()
    return not llm._scheduler.has_work and llm.engine.kv_cache.free_sequences == llm.plan.max_batch


def during_a_step(llm, monkeypatch, call, name="decode_step"):
    """Let `call` happen once, inside the next step that decodes."""
    original, calls = getattr(llm.engine, name), [call]

    def with_call(*arguments, **options):
        if calls:
            calls.pop()()
        return original(*arguments, **options)

    monkeypatch.setattr(llm.engine, name, with_call)
