"""Models from GGUF files: the values of the file and nothing else, on every lane, whatever formats its tensors mix."""

from functools import partial

import pytest
import torch

from hetero_attn import LLM
from hetero_attn.checkpoints.gguf.file import GgufFile
from hetero_attn.checkpoints.sources import read_config, stored_formats
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import CheckpointError, UnsupportedModelError
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import PlannedModel, plan_model
from hetero_attn.spec.workload import Sizes, build_workload
from placement.machine.hardware import HardwareProfile
from tests.support.models.gguf_models import make_gguf
from tests.support.models.runtime import cpu_plan, model_logits, nmse, run_logits, uniform_plan
from tests.support.models.toy import hf_logits

TOKENS = tuple(torch.randint(260, (40,), generator=torch.Generator().manual_seed(3)).tolist())
logits = partial(model_logits, tokens=TOKENS)
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_k": "Q5_K", "token_embd": "Q8_0", "output": "Q6_K"}
# Every format at least once, alone and mixed inside qkv and gate_up.
CASES = {
    "Q4_K_M": (MIXED, "Q4_K"),
    "legacy": (
        {"attn_q": "Q5_0", "attn_v": "Q8_0", "ffn_up": "Q5_1", "ffn_down": "Q4_1", "token_embd": "Q5_1"},
        "Q4_0",
    ),
    "iq4": ({"attn_v": "IQ4_NL", "ffn_gate": "Q5_K", "token_embd": "IQ4_NL", "output": "IQ4_XS"}, "IQ4_XS"),
    "mxfp4": ({"attn_v": "BF16", "ffn_gate": "F16", "token_embd": "MXFP4"}, "MXFP4"),
    "f16": ({"attn_v": "BF16", "token_embd": "F16"}, "F16"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(GGUF file, directory of the same values) by case, made when first asked for."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = make_gguf(tmp_path_factory.mktemp(case), *CASES[case])
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_file(models, case):
    """Held in float32 a GGUF model and a checkpoint of its dequantised values are one and the same."""
    gguf_file, plain = models(case)

    assert torch.equal(logits(gguf_file, "fp32"), logits(plain, "fp32"))
    assert nmse(logits(gguf_file, "fp32"), hf_logits(plain, list(TOKENS))) < 1e-10


def test_a_start_reads_the_header_of_a_file_once(models, monkeypatch):
    """For its sizes, formats, tokenizer and weights, and those of what drafts; afterwards no header is kept."""
    read, plain = [], GgufFile._read_metadata
    monkeypatch.setattr(GgufFile, "_read_metadata", lambda self, *rest: read.append(self.path) or plain(self, *rest))
    large, small = models("Q4_K_M")[0], models("legacy")[0]

    with LLM(large, device="cpu", max_context=64, num_threads=2, speculate=small, progress=False) as llm:
        assert sorted(read) == sorted([large, small])
        read_config(large, llm.planned.headers)
    assert read.count(large) == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_families(tmp_path, family, tied):
    gguf_file, plain = make_gguf(tmp_path, {"attn_v": "Q6_K"}, "Q8_0", family, tied=tied)

    assert nmse(logits(gguf_file, "fp32"), hf_logits(plain, list(TOKENS))) < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_differ_by_the_rounding_of_activations_alone(models, case):
    gguf_file, plain = models(case)

    assert nmse(logits(gguf_file, kv_dtype="fp32"), hf_logits(plain, list(TOKENS))) < 3e-3


def engine_of(path, make_plan, elastic=False, paired=False):
    config = read_config(path)
    formats = stored_formats(path, config)
    workload = build_workload(
        decoder(config, formats),
        formats,
        "m",
        Sizes(max_context=64, max_batch=2, page_size=4, prefill_chunk=16),
        paired=paired,
    )
    plan = make_plan(workload)
    return build_engine(
        PlannedModel(path, config, formats.label, plan.device, HardwareProfile.named("emulated"), plan, formats=formats)
    )


def run(engine):
    try:
        return run_logits(engine, TOKENS, 30)
    finally:
        engine.close()


@pytest.mark.table
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("gpu", "stream"), [(0.5, 0.25), (0.0, 0.6), (1.0, 0.0)])
def test_any_cut_gives_the_same_logits(models, case, gpu, stream):
    gguf_file, _ = models(case)
    expected = run(engine_of(gguf_file, cpu_plan))

    actual = run(engine_of(gguf_file, lambda workload: uniform_plan(workload, gpu, stream, 1)))

    assert nmse(actual, expected) <= 1e-4


def test_row_cuts_fall_between_superblocks(models):
    gguf_file, _ = models("Q4_K_M")
    expected = run(engine_of(gguf_file, cpu_plan))

    def half(workload):
        down = next(shard for shard in workload.linears if shard.kind == "down")
        assert down.row_cut and down.units == 2
        return uniform_plan(workload, 0.5, 0.0, 1)

    assert nmse(run(engine_of(gguf_file, half, paired=True)), expected) <= 1e-4


def test_a_plan_reads_headers_only_and_sizes_what_is_loaded(models, monkeypatch):
    gguf_file, _ = models("Q4_K_M")
    monkeypatch.setattr("hetero_attn.checkpoints.gguf.checkpoint.GgufCheckpoint.read", None)

    plan = plan_model(gguf_file, device="cpu", max_context=64)

    assert plan.workload.weight_dtype == "q4_k+q5_k+q6_k+q8"
    qkv = next(shard for shard in plan.workload.linears if shard.kind == "qkv")
    assert qkv.weight_format == "q4_k*8+q5_k*4+q6_k*4"


def test_text_in_and_text_out(models):
    with LLM(models("Q4_K_M")[0], device="cpu", max_context=128, progress=False) as llm:
        assert llm.tokenizer.encode("hé") == [1, *llm.tokenizer.encode("hé")[1:]]
        assert llm.tokenizer.decode(llm.tokenizer.encode("hé 1")) == "hé 1"
        assert llm.tokenizer.encode_chat([{"role": "user", "content": "a"}])[-1] == 3
        assert set(llm.planned.config.eos_token_ids) == {2, 3}


def test_a_directory_with_one_file_is_that_file_and_several_need_a_pattern(models, tmp_path):
    source = models("Q4_K_M")[0].read_bytes()
    (tmp_path / "a-Q4_K_M.gguf").write_bytes(source)

    assert plan_model(tmp_path, device="cpu", max_context=64).model == "a-Q4_K_M.gguf"
    (tmp_path / "a-Q8_0.gguf").write_bytes(source)
    with pytest.raises(CheckpointError, match="a-Q4_K_M.gguf, a-Q8_0.gguf"):
        plan_model(tmp_path, device="cpu")
    assert plan_model(tmp_path, device="cpu", max_context=64, file="*Q8_0*").model == "a-Q8_0.gguf"
    with pytest.raises(CheckpointError, match="no GGUF model matches"):
        plan_model(tmp_path, device="cpu", file="*Q2*")


def test_another_tokenizer_goes_before_the_files_own(models, tmp_path):
    """That of a folder: its ids, whatever lies beside or inside the model."""
    from tests.support.models.toy import edit_json, save_tokenizer

    save_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer.json", post_processor=None)
    with LLM(models("Q4_K_M")[0], device="cpu", max_context=64, progress=False, tokenizer=tmp_path) as llm:
        assert llm.tokenizer.path == tmp_path
        assert llm.tokenizer.encode("a") == llm.tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(CheckpointError, match="no tokenizer is there"):
        LLM(models("Q4_K_M")[0], device="cpu", tokenizer=tmp_path / "nothing")


def test_a_type_that_is_not_run_is_refused_with_its_cost(tmp_path):
    gguf_file, _ = make_gguf(tmp_path, {"ffn_up": "Q3_K"}, "Q8_0", layers=1)

    with pytest.raises(UnsupportedModelError, match=r"Q3_K.*mlp.up_proj.*IQ4_XS or Q4_K_M.*GiB"):
        plan_model(gguf_file, device="cpu")
