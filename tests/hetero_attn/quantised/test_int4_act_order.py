"""GPTQ with inputs in an order of their own: held packed and exactly, or as float32 where one order cannot serve."""

import functools
import shutil

import pytest
import torch

from hetero_attn import Policy
from hetero_attn.planning.settle import plan_model
from tests.support.models.runtime import nmse
from tests.support.models.toy import hf_logits
from tests.support.quantised.int4_cases import gptq_v2
from tests.support.quantised.int4_models import (
    edit_tensors,
    gptq,
    gptq_config,
    gptq_of_8_bits,
    make_int4,
    words,
)
from tests.support.quantised.quantised_models import CUT, TOKENS, UP, logits


def scatter(folder, linears, bits=4):
    """Give linears of `folder`/int4 and `folder`/plain the order of inputs that act-order leaves; one order for each
    number of inputs."""

    def order_of(inputs):
        return torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))

    def in_file(tensors):
        for prefix in linears:
            found, index = tensors[f"{prefix}qweight"].t(), tensors[f"{prefix}g_idx"]
            shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
            codes = ((found[..., None] >> shifts) & (1 << bits) - 1).flatten(1)[:, order_of(len(index))]
            stored = words(codes) if bits == 4 else codes.to(torch.uint8).contiguous().view(torch.int32)
            tensors |= {f"{prefix}qweight": stored.t(), f"{prefix}g_idx": index[order_of(len(index))]}

    def in_plain(tensors):
        for name in (f"{prefix}weight" for prefix in linears):
            tensors[name] = tensors[name][:, order_of(tensors[name].shape[1])]

    edit_tensors(folder / "int4", in_file)
    edit_tensors(folder / "plain", in_plain)


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")


LINEARS += ("mlp.up_proj", "mlp.down_proj")
ALL_LINEARS = [f"model.layers.{layer}.{linear}." for layer in range(2) for linear in LINEARS]


EIGHT_BITS = functools.partial(gptq_of_8_bits, taken=0)


# writer, config, inputs of a group, further arguments of make_int4, bits, what the linears are held in
ACT_ORDER = {
    "4 bits": (gptq_v2, gptq_config(32, checkpoint_format="gptq_v2"), 32, {"family": "qwen3"}, 4, "int4_g32"),
    "4 bits, symmetric": (gptq, gptq_config(64, sym=True), 64, {"symmetric": True}, 4, "int4_g64"),
    "8 bits": (EIGHT_BITS, gptq_config(64, bits=8, checkpoint_format="gptq_v2"), 64, {}, 8, "uint8_g64"),
}


@pytest.mark.parametrize("case", ACT_ORDER)
def test_act_order_is_held_packed_and_exactly(tmp_path, case):
    """Such linears were held as float32, eight times their file."""
    write, config, each, more, bits, held = ACT_ORDER[case]
    folder = make_int4(tmp_path, write, config, each, **more)
    in_runs = plan_model(folder / "int4", device="cpu", max_context=64).workload
    scatter(folder, ALL_LINEARS, bits)
    scattered = plan_model(folder / "int4", device="cpu", max_context=64).workload

    assert {scattered.format_of(shard) for shard in scattered.linears} == {"fp16", held}
    assert scattered.linears == in_runs.linears
    orders = 2 * (3 * 128 + 256)  # of qkv, o, gate_up and down
    assert scattered.resident_bytes == in_runs.resident_bytes + 4 * orders
    assert torch.equal(logits(folder / "int4", "fp32"), logits(folder / "plain", "fp32"))
    packed = logits(folder / "int4", kv_dtype="fp32")
    assert nmse(packed, hf_logits(folder / "plain", TOKENS)) < 3e-3
    cut = logits(folder / "int4", device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, packed) <= 1e-4


def test_act_order_is_taken_back_where_weights_are_packed_anew(tmp_path):
    write, config, each, more, bits, _ = ACT_ORDER["4 bits"]
    folder = make_int4(tmp_path, write, config, each, **more)
    scatter(folder, ALL_LINEARS, bits)
    policy = Policy.parse("version: 1\nrules:\n  - {match: layers.*.down, dtype: q8}\n")

    expected = logits(folder / "plain", "q8", kv_dtype="fp32")

    assert nmse(logits(folder / "int4", "q8", kv_dtype="fp32"), expected) <= 1e-4
    assert nmse(logits(folder / "int4", policy=policy, kv_dtype="fp32"), expected) < 3e-3


def test_groups_that_act_order_scattered_apart_are_float32_and_said_so(int4_models, tmp_path):
    """gate and up multiply the same rows, which have one order."""
    shutil.copytree(int4_models("gptq v2"), tmp_path, dirs_exist_ok=True)
    scatter(tmp_path, [UP])

    with pytest.warns(UserWarning, match="1 quantised linears .*up_proj.* float32, exactly but large.*act-order"):
        values = logits(tmp_path / "int4", kv_dtype="fp32")

    assert torch.equal(logits(tmp_path / "int4", "fp32"), logits(tmp_path / "plain", "fp32"))
    assert nmse(values, hf_logits(tmp_path / "plain", TOKENS)) < 3e-3
