"""Whole models of every kind through the public door, cut over three lanes: on a CUDA device, and emulated everywhere.

An emulated run of some cases shows that they are right themselves, so what fails on a GPU alone is the GPU's.
"""

from __future__ import annotations

import pytest
import torch

from hetero_attn import LLM, SamplingParams
from placement import Policy
from tests.support.models.delta_gguf import delta_gguf
from tests.support.models.gguf_models import make_gguf
from tests.support.models.moe import make_moe
from tests.support.models.runtime import nmse
from tests.support.models.toy import make_checkpoint

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on(names: str, *cases: tuple, shown: int = 1) -> pytest.MarkDecorator:
    """The first cases emulated too; all on CUDA."""
    emulated = [pytest.param("emulated", *case) for case in cases[:shown]]
    return pytest.mark.parametrize(
        f"device,{names}", emulated + [pytest.param("cuda", *case, marks=NEEDS_CUDA) for case in cases]
    )


# Of every linear a third to each lane, experts in DRAM with copies of some on the GPU, one KV head a lane.
CUT = """
  - {match: "*.kv", kv: {gpu_heads: 1}}
  - {match: "*", gpu: 0.3, stream: 0.3, cpu: 0.4}
"""
EXPERTS = """
  - {match: "*.experts", gpu: 0.0, expert_slots: 3}"""
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(2)).tolist()
# As tests of lanes hold the dense families: bf16 products and probabilities of tensor cores.
NEAR = 2e-3
MOES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss", "glm4_moe")
KINDS = ("Q4_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16")


def cut(rules: str = CUT) -> Policy:
    """The policy of these rules."""
    return Policy.parse(f"rules:{rules}", "cut")


def logits(path, device: str, dtype: str = "auto", rules: str = CUT) -> torch.Tensor:
    """Logits of a prompt; tokens decoded before and after it are the same."""
    options = {} if device == "cpu" else {"policy": cut(rules), "gpu_memory": "2GiB"}
    with LLM(path, dtype=dtype, device=device, max_context=64, progress=False, num_threads=2, **options) as llm:
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=5)
        answer = llm.generate(TOKENS, params)[0]
        found = llm.logits(TOKENS)
        again = llm.generate(TOKENS, params)[0]

    assert again.token_ids == answer.token_ids
    return found


@on("family,dtype", *((family, dtype) for dtype in ("q4", "q8", "bf16") for family in MOES), shown=2)
def test_experts_and_delta_layers_on_three_lanes(tmp_path, device, family, dtype):
    path = make_moe(tmp_path, family, layers=3 if "qwen3_5" in family or "next" in family else 2)

    assert nmse(logits(path, device, dtype, EXPERTS + CUT), logits(path, "cpu", dtype)) <= NEAR


@on("kind", *((kind,) for kind in KINDS))
def test_every_gguf_type_on_three_lanes(tmp_path, device, kind):
    path, _ = make_gguf(tmp_path, {}, default=kind)

    assert nmse(logits(path, device), logits(path, "cpu")) <= NEAR


@on("family", ("qwen3_next",), shown=0)
def test_delta_layers_from_gguf_on_three_lanes(tmp_path, device, family):
    path, _ = delta_gguf(tmp_path, family)

    assert nmse(logits(path, device), logits(path, "cpu")) <= NEAR


@on("kv_dtype,limit", ("q8", NEAR), ("q4", 1e-2))  # a step of 4 bits is large where it is taken
def test_a_packed_cache_on_three_lanes(tmp_path, device, kv_dtype, limit):
    path = make_checkpoint(tmp_path, head_dim=64, hidden=192, intermediate=256)
    options = {"dtype": "bf16", "kv_dtype": kv_dtype, "max_context": 64, "progress": False, "num_threads": 2}
    with LLM(path, device="cpu", **options) as llm:
        expected = llm.logits(TOKENS)
    with LLM(path, device=device, policy=cut(), gpu_memory="2GiB", **options) as llm:
        found = llm.logits(TOKENS)

    assert nmse(found, expected) <= limit


@on("drafter", ("ngram",))
def test_drafts_change_no_token_on_three_lanes(tmp_path, device, drafter):
    """Verify passes of several rows: a repeating prompt, so that n-grams draft."""
    path = make_checkpoint(tmp_path, head_dim=64, hidden=192, intermediate=256)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompt, told = [1, 2, 3, 4, 5] * 4, []
    for speculate in ("off", drafter):
        options = {"dtype": "fp32", "speculate": speculate, "max_context": 128, "progress": False, "num_threads": 2}
        with LLM(path, device=device, policy=cut(), gpu_memory="2GiB", **options) as llm:
            told.append(llm.generate(prompt, params)[0].token_ids)

    assert told[0] == told[1]
