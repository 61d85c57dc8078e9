"""Plans of quantised models by their config alone: the same as with their files, or the message that files are needed."""

import pytest

from hetero_attn import plan_model
from hetero_attn.checkpoints.quantised.declared import declared_formats
from hetero_attn.checkpoints.quantised.scheme import GroupScheme, Scheme
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.config import ModelConfig


def alone(source, folder):
    """A directory with the config of a model and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def held(path):
    """The format and the bytes of every linear in a plan but the head, which is float16 in files of another config."""
    workload = plan_model(path, device="cpu", max_context=64).workload
    linears = (shard for shard in workload.linears if shard.kind != "head")
    return {shard.name: (workload.format_of(shard), shard.total_bytes) for shard in linears}


@pytest.mark.parametrize("case", ["gptq", "awq"])
def test_four_bits_are_planned_as_with_their_files(int4_models, tmp_path, case):
    folder = int4_models(case) / "int4"

    assert held(alone(folder, tmp_path / "alone")) == held(folder)


@pytest.mark.parametrize("case", ["fp8 blocks", "fp8 blocks of 32", "nf4"])
def test_bytes_and_nf4_are_planned_as_with_their_files(scaled_models, tmp_path, case):
    folder = scaled_models(case) / "scaled"

    assert held(alone(folder, tmp_path / "alone")) == held(folder)


def test_groups_that_no_reader_runs_have_no_format(int4_models):
    """96 inputs are three groups of 32, which the reader of the files refuses too."""
    config = ModelConfig.from_dir(int4_models("gptq") / "int4")
    groups = [GroupScheme("gptq", 4, group=each) for each in (96, 256)]
    found = [declared_formats(Scheme("gptq", (group,)), config) for group in groups]

    assert found[0] is None and set(found[1].by_tensor.values()) == {"int4_g128"}


def test_a_config_that_does_not_say_all_needs_the_files(scaled_models, tmp_path):
    """Four bits of compressed-tensors may be integers, MXFP4 or NVFP4."""
    with pytest.raises(CheckpointError, match="plan --dtype q4"):
        plan_model(alone(scaled_models("nvfp4") / "scaled", tmp_path / "alone"), device="cpu")


@pytest.mark.parametrize(
    ("ignored", "plain"),
    [
        (("model.layers.*.self_attn",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), {"down_proj"}),
        (("self_attn", "proj"), set()),
    ],
    ids=["glob", "names", "parts of names"],
)
def test_modules_that_are_left_out_are_plain(int4_models, ignored, plain):
    config = ModelConfig.from_dir(int4_models("gptq") / "int4")
    found = declared_formats(Scheme("mxfp4", (GroupScheme("mxfp4"),), ignored), config)

    assert {name.split(".")[-2] for name, held in found.by_tensor.items() if held != "mxfp4"} == plain


def test_expressions_are_not_run(int4_models):
    config = ModelConfig.from_dir(int4_models("gptq") / "int4")

    assert declared_formats(Scheme("mxfp4", (GroupScheme("mxfp4"),), ("re:.*",)), config) is None
