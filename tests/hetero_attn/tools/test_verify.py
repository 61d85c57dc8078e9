"""`verify` on a deep model: rounding passes whatever the depth, and every planted bug is named by its layer."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn import LLM
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import PromptError
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools import verify
from hetero_attn.tools.verify import VerifyReport
from placement.machine.hardware import HardwareProfile
from tests.support.models.runtime import cpu_plan, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint
from tests.support.planted.placement_bugs import PLANTED

LAYERS, FEW_LAYERS = 30, 6
TOKEN_IDS = torch.randint(307, (32,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """As many layers as a small trained model has; the fixed limits that four layers kept do not hold here."""
    return make_checkpoint(tmp_path_factory.mktemp("deep"), "llama", layers=LAYERS, intermediate=96)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The same with fewer layers, for bugs that are in every layer: the fewer there are, the fewer can show them."""
    return make_checkpoint(tmp_path_factory.mktemp("shallow"), "llama", layers=FEW_LAYERS, intermediate=96)


@contextmanager
def loaded(path, weight_dtype: str, split: bool, kv_dtype: str | None = None, prefill_chunk: int = 16):
    """A plan with all three lanes and a spilled cache, or the CPU lane alone, and its engine."""
    workload = toy_workload(path, weight_dtype, page_size=4, prefill_chunk=prefill_chunk, kv_dtype=kv_dtype)
    plan = uniform_plan(workload, gpu=0.3, stream=0.4, gpu_kv_heads=1) if split else cpu_plan(workload)
    machine = HardwareProfile.named("emulated")
    planned = PlannedModel(path, ModelConfig.from_dir(path), weight_dtype, plan.device, machine, plan)
    engine = build_engine(planned)
    try:
        yield planned, engine
    finally:
        engine.close()


def report(path, weight_dtype: str, split: bool = True, kv_dtype: str | None = None, **loading) -> VerifyReport:
    """Verify such a plan on 32 tokens and 4 more."""
    with loaded(path, weight_dtype, split, kv_dtype, **loading) as (planned, engine):
        return verify.compare(planned, engine, TOKEN_IDS, 4)


# An ordinary run takes the dtype and the plan that round most in thirty layers, and of the others a few layers.
OFTEN = {("q4", True)}
PLANS = [
    pytest.param(dtype, split, id=f"{dtype}-{kind}", marks=() if (dtype, split) in OFTEN else pytest.mark.matrix)
    for dtype in ("fp32", "bf16", "q8", "q4")
    for split, kind in ((True, "three lanes"), (False, "cpu"))
]


@pytest.mark.parametrize("weight_dtype,split", PLANS)
def test_thirty_layers_pass_in_every_dtype(deep, weight_dtype, split):
    found = report(deep, weight_dtype, split)

    assert found.passed, found.table()
    assert len(found.stages) == LAYERS + 2
    assert found.tokens == 36


@pytest.mark.parametrize("weight_dtype", ["fp32", "q8"])
def test_few_layers_pass_on_the_cpu_alone(shallow, weight_dtype):
    found = report(shallow, weight_dtype, split=False)

    assert found.passed, found.table()
    assert len(found.stages) == FEW_LAYERS + 2


@pytest.mark.parametrize("split", [True, False], ids=["three lanes", "cpu"])
def test_sums_onto_massive_residuals_may_fall_to_either_float32(tmp_path, split):
    """A trained model has features of some tokens that are thousands of times what a layer adds: one sum that falls to
    the other side there was 20 times the limit, and SmolLM2 in fp32 was said to change its answer."""
    path = make_checkpoint(tmp_path, layers=FEW_LAYERS, intermediate=96)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, :24] += 20000.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = report(path, "fp32", split)

    assert found.passed, found.table()
    assert all(1e-10 < stage.limit < 1e-6 for stage in found.stages[1:-1])


@pytest.mark.parametrize("budget", [{"device": "cpu"}, {"device": "emulated", "gpu_memory": "700KiB"}])
def test_an_embedding_that_stays_packed_is_read_by_the_yardsticks_too(tmp_path, budget):
    """They had no way to gather its rows, and `verify --dtype q4` of a tied model ended with a traceback."""
    path = make_checkpoint(tmp_path, tied=True)
    with LLM(path, dtype="q4", max_context=64, progress=False, **budget) as llm:
        assert llm.engine.weights.embed_format == "q8"

        found = verify.run(llm, TOKEN_IDS, 4)

    assert found.passed, found.table()


@pytest.mark.parametrize(
    ("layers", "kv_dtype"),
    [("shallow", "q4"), *(pytest.param("deep", kind, marks=pytest.mark.matrix) for kind in ("q8", "q4"))],
)
def test_a_quantised_cache_passes_and_the_table_fits_eighty_columns(request, layers, kv_dtype):
    found = report(request.getfixturevalue(layers), "bf16", kv_dtype=kv_dtype)

    assert found.passed, found.table()
    assert found.kv_cost is not None
    assert max(map(len, found.table().splitlines())) <= 80


def caught(path, weight_dtype: str) -> bool:
    """Whether a bug shows with room to spare: ten times over the limit of some stage, or over that at the end.

    Chunks are short: a bug at the boundary changes one token of a pass, and more passes cross the boundary.
    """
    found = report(path, weight_dtype, prefill_chunk=8)
    return not found.passed and max(stage.error / stage.limit for stage in found.stages) > 10


# Of bf16 every bug is planted in an ordinary run; q4, which hides more, passes at thirty layers there.
@pytest.mark.parametrize("weight_dtype", ["bf16", pytest.param("q4", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("bug", PLANTED)
def test_what_is_little_in_a_layer_and_drowned_at_the_end_of_thirty_is_caught(shallow, monkeypatch, bug, weight_dtype):
    PLANTED[bug](monkeypatch)

    assert caught(shallow, weight_dtype)


@pytest.mark.parametrize("weight_dtype", ["bf16", pytest.param("q4", marks=pytest.mark.matrix)])
def test_without_a_planted_bug_nothing_shows(shallow, weight_dtype):
    found = report(shallow, weight_dtype)

    assert found.passed, found.table()


def test_the_first_layer_that_differs_is_named(shallow):
    """One block of one layer is damaged after loading; the layers behind it get the reference's input, and agree."""
    with loaded(shallow, "bf16", split=True) as (planned, engine):
        engine.weights.linear("layers.3.down").dram[0].fill_(0)
        found = verify.compare(planned, engine, TOKEN_IDS, 8)

    assert [stage.name for stage in found.stages if stage.error > stage.limit] == ["layer 3"]
    assert found.to_dict()["first_divergence"] == "layer 3" and not found.passed
    assert "layer 3" in found.table() and "THE PLAN CHANGES THE ANSWER" in found.table()


def test_a_model_without_tokenizer_says_so(tmp_path):
    """It ended in an AttributeError."""
    path = make_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with LLM(path, device="cpu", progress=False) as llm:
        with pytest.raises(PromptError, match="no tokenizer"):
            verify.run(llm, "text")

        assert verify.run(llm, [5, 6, 7, 8], 4).passed


def test_a_long_text_is_cut_to_what_fits(tmp_path):
    path = make_checkpoint(tmp_path)
    with LLM(path, device="cpu", max_context=64, progress=False) as llm:
        found = verify.run(llm, "a" * 500, 8)

        assert found.tokens == 64
        with pytest.raises(PromptError, match="context of this plan holds 64"):
            verify.run(llm, "a", 64)
