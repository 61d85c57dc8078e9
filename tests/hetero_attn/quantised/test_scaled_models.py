"""FP8, int8, MXFP4, NVFP4 and NF4 models: the values of the file and nothing else, on every lane, or a refusal."""

import pytest
import torch

from cpu_kernels.formats import format_of
from hetero_attn.checkpoints.sources import open_source, read_config
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import plan_model
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.runtime import nmse
from tests.support.quantised.int4_models import edit_tensors
from tests.support.quantised.quantised_models import assert_lanes_agree, logits
from tests.support.quantised.scaled_cases import SCALED_CASES, W8A8
from tests.support.quantised.scaled_models import (
    int8_channel,
    make_scaled,
)


@pytest.mark.filterwarnings("ignore:.*held as float32")
@pytest.mark.parametrize("case", SCALED_CASES)
def test_values_are_those_of_the_file_to_the_bit(scaled_models, case):
    """Held in float32 the model and a checkpoint of its dequantised values are one and the same."""
    folder = scaled_models(case)

    assert torch.equal(logits(folder / "scaled", "fp32"), logits(folder / "plain", "fp32"))


@pytest.mark.filterwarnings("ignore:.*held as float32")
@pytest.mark.parametrize("case", SCALED_CASES)
def test_linears_are_held_in_the_forms_of_their_file(scaled_models, case):
    workload = plan_model(scaled_models(case) / "scaled", device="cpu", max_context=64).workload
    mixes = {workload.format_of(shard) for shard in workload.linears if shard.kind != "head"}

    assert {part.partition("*")[0] for mix in mixes for part in mix.split("+")} == SCALED_CASES[case][3]


@pytest.mark.parametrize(
    "case",
    [
        *("fp8 blocks", "fp8 blocks of 32", "fp8 blocks of 64"),
        *("w8a8", "int8 packed with zero points", "mxfp4", "nvfp4", "nf4", "mixed"),
    ],
)
def test_lanes_agree_and_differ_from_the_file_by_the_rounding_of_activations_alone(scaled_models, case):
    folder = scaled_models(case)

    assert_lanes_agree(folder / "scaled", folder / "plain")


@pytest.mark.parametrize(
    ("name", "file_bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("nf4", 4.5), ("fp8", 8), ("int8", 8)]
)
def test_a_packed_weight_is_little_larger_than_the_files(name, file_bits):
    """NVFP4 was held with a float32 scale for every 16 inputs, 6 bits a weight."""
    assert format_of(name).bits_per_weight() <= 1.032 * file_bits


def test_fp8_is_packed_as_q8_where_that_is_asked_for(scaled_models):
    folder = scaled_models("fp8 blocks")

    assert 0 < nmse(logits(folder / "scaled", "q8"), logits(folder / "scaled")) < 1e-2


def test_q8_of_fp8_blocks_is_off_by_less_than_five_in_a_hundred_thousand():
    """Of normal weights as FP8 files have them; the files' own rounding is off by 7 in ten thousand."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    scale = values.abs().amax() / 448
    values = (values / scale).to(torch.float8_e4m3fn).float() * scale
    weight, found = torch.empty(4, format_of("q8").block_bytes(512), dtype=torch.uint8), torch.empty(64, 512)

    kernels().pack(values, "q8", weight)
    kernels().unpack_rows(weight, "q8", torch.arange(64), found)

    assert nmse(found, values) < 5e-5


def test_what_no_format_holds_is_said(scaled_models):
    with pytest.warns(UserWarning, match="14 quantised linears .* held as float32, .*of 48 inputs, no multiple of 32"):
        logits(scaled_models("fp8 narrow blocks") / "scaled")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8", "auto"])
def test_rows_of_an_embedding_may_end_within_a_group_of_codes(tmp_path, dtype):
    """192 inputs in groups of 128."""
    shape = {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "layers": 1}
    folder = make_scaled(tmp_path, {"": int8_channel}, W8A8, **shape)
    name, values = "model.embed_tokens.weight", {}

    def quantise(tensors):
        parts, values[name] = int8_channel(*tensors.pop(name).shape, torch.Generator().manual_seed(1))
        tensors |= {f"model.embed_tokens.{part}": item for part, item in parts.items()}

    edit_tensors(folder / "scaled", quantise)
    edit_tensors(folder / "plain", lambda tensors: tensors.update(values))

    assert nmse(logits(folder / "scaled", dtype), logits(folder / "plain", "fp32")) < (
        1e-10 if dtype == "fp32" else 3e-2
    )


def test_oddities_met_on_opening_are_said_of_quantised_models_too(scaled_models):
    with open_source(scaled_models("w8a8") / "scaled") as source:
        source.warnings.append("something odd")

        assert source.check(decoder(read_config(source.path))) == ["something odd"]
