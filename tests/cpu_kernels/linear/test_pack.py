"""pack: the bytes of the layout, the quality of quantisation, and what it refuses."""

import hashlib

import numpy as np
import pytest
import torch

from cpu_kernels.formats import weights as layout
from tests.support.kernels.cpu_oracles import ISAS, kernels, nmse, pack, unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
def test_row_major_weights_are_the_rounded_rows(weight_dtype, source):
    rows = torch.randn(32, 50).to(source)

    packed = pack(rows, weight_dtype)

    assert torch.equal(packed.view(DTYPES[weight_dtype]).reshape(32, 50), rows.to(DTYPES[weight_dtype]))


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
@pytest.mark.parametrize("in_features", [1, 64, 130])
def test_linear_reads_what_a_slow_reader_reads(in_features, weight_dtype):
    """Unit inputs pick out single weights: +-127 quantises to itself, so each output is one stored value, exactly."""
    torch.manual_seed(in_features)
    packed = pack(torch.randn(32, in_features), weight_dtype)
    out = torch.empty(in_features, 32)

    kernels().linear(127 * torch.eye(in_features), packed, weight_dtype, None, out)

    assert torch.allclose(out.T.double() / 127, unpack(packed, weight_dtype, in_features), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_weights_on_the_grid_survive_exactly(weight_dtype):
    """Values that one scale represents: a wrong nibble, feature or line order cannot reproduce them."""
    torch.manual_seed(0)
    if weight_dtype == "q4":
        rows = torch.stack([torch.randperm(64) % 16 for _ in range(16)]) * 0.125 - 1
    else:
        rows = torch.stack([torch.randperm(255)[:64] for _ in range(16)]) * 0.5 - 63.5
        rows[:, [5, 40]] = -63.5

    packed = pack(rows, weight_dtype)

    assert torch.equal(unpack(packed, weight_dtype, 64).float(), rows)


def ggml_round_trip(rows: torch.Tensor, weight_dtype: str) -> torch.Tensor:
    """Q8_0 and Q4_0 of llama.cpp: blocks of 32, one float16 scale, Q4_0 from the extreme of largest magnitude."""
    blocks = rows.reshape(-1, 32)
    if weight_dtype == "q8":
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        return (torch.round(blocks / scale) * scale).reshape(rows.shape)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half().float()
    return (torch.clamp(torch.floor(blocks / scale + 8.5), 0, 15) - 8).mul(scale).reshape(rows.shape)


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
def test_no_worse_than_llama_cpp_on_gaussian_weights(weight_dtype):
    torch.manual_seed(0)
    rows = torch.randn(64, 512)

    error = nmse(unpack(pack(rows, weight_dtype), weight_dtype, 512), rows)

    assert error <= nmse(ggml_round_trip(rows, weight_dtype), rows)
    assert error <= {"q8": 3e-5, "q4": 6.9e-3}[weight_dtype]


@pytest.mark.parametrize("weight_dtype", layout.WEIGHT_DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(value, weight_dtype):
    rows = torch.zeros(16, 70)
    rows[15, 69] = value

    with pytest.raises(ValueError, match="non-finite"):
        pack(rows, weight_dtype)


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-9, 3e4])
def test_constant_rows(value, weight_dtype):
    rows = torch.full((16, 64), value)

    restored = unpack(pack(rows, weight_dtype), weight_dtype, 64)

    assert torch.allclose(restored.float(), rows, rtol=1e-2, atol=1e-6)


def test_strided_rows_and_whole_blocks_only():
    rows = torch.randn(16, 200)

    assert torch.equal(pack(rows[:, :64], "q4"), pack(rows[:, :64].contiguous(), "q4"))
    with pytest.raises(ValueError, match="multiple of 16"):
        kernels().pack(rows[:7], "q4", torch.empty(1, 576, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("weight_dtype", "in_features", "expected"),
    [("fp32", 100, 6400), ("bf16", 100, 3200), ("q8", 100, 2176), ("q4", 100, 1152), ("q4", 64, 576)],
)
def test_block_bytes(weight_dtype, in_features, expected):
    assert layout.block_bytes(weight_dtype, in_features) == expected
    assert layout.weight_bytes(weight_dtype, 17, in_features) == 2 * expected


def any_rows(in_features: int) -> torch.Tensor:
    """32 rows of numbers of many sizes and of few values, all alike, all zeros of both signs, very small and very large."""
    index = np.arange(32 * in_features, dtype=np.uint64).reshape(32, in_features)
    drawn = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # 24 bits
    signs = np.where(index * np.uint64(0xC2B2AE3D27D4EB4F) >> np.uint64(63), -1.0, 1.0)
    rows = (drawn.astype(np.float64) / (1 << 23) - 1.0) ** 3
    rows[8:16] = np.round(4 * rows[8:16]) / 4 * signs[8:16]
    rows[16:20] = np.abs(np.round(2 * rows[16:20])) * signs[16:20]
    rows[20], rows[21], rows[22] = 0.0, -0.0, 1.5
    rows[23:25] *= np.array([[1e-7], [6e4]])
    rows[25:28] += np.array([[1.0], [-40.0], [3e3]])
    return torch.from_numpy(rows.astype(np.float32))


# What the search chose that took one group of one feature after the other, with all sums over the lanes of a register.
CHOSEN = {
    ("q8", "fp32", 1): "38df78831538f918",
    ("q8", "fp32", 130): "276500262fd3f30f",
    ("q8", "fp32", 704): "2815c18ef7743283",
    ("q8", "bf16", 1): "b5039d4c49cbca25",
    ("q8", "bf16", 130): "7df9e089e777c99c",
    ("q8", "bf16", 704): "7dc78b28fe778adf",
    ("q8", "fp16", 1): "fbc6c40fa4e68788",
    ("q8", "fp16", 130): "58e8736fa05bf832",
    ("q8", "fp16", 704): "a22aa69d83e83311",
    ("q4", "fp32", 1): "d57de23db3415908",
    ("q4", "fp32", 130): "fe6f252f11995fb5",
    ("q4", "fp32", 704): "3cc0742bb9662412",
    ("q4", "bf16", 1): "aa37176799b617bb",
    ("q4", "bf16", 130): "cc2de6005c7285fe",
    ("q4", "bf16", 704): "e1245bfb41f11f70",
    ("q4", "fp16", 1): "0948c4a89e72141f",
    ("q4", "fp16", 130): "feee2929f812e466",
    ("q4", "fp16", 704): "20d35f1b1d8361ce",
}


@pytest.mark.parametrize(("weight_dtype", "source", "in_features"), CHOSEN)
def test_what_is_chosen_stays_the_same_to_the_bit(weight_dtype, source, in_features):
    packed = pack(any_rows(in_features).to(DTYPES[source]), weight_dtype)

    assert digest(packed) == CHOSEN[weight_dtype, source, in_features]


@pytest.mark.parametrize("weight_dtype", ["q8", "q4"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_chooses_the_same(isa, weight_dtype):
    packed = torch.empty(2, layout.block_bytes(weight_dtype, 130), dtype=torch.uint8)

    kernels(isa).pack(any_rows(130).bfloat16(), weight_dtype, packed)

    assert digest(packed) == CHOSEN[weight_dtype, "bf16", 130]


def digest(packed: torch.Tensor) -> str:
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("in_features", [1, 63, 64, 100, 256])
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "fp16", "q8"])
def test_blocks_may_have_others_between(weight_dtype, in_features):
    """As those of gate have those of up."""
    rows = torch.randn(48, in_features, generator=torch.Generator().manual_seed(0))
    rows = rows.to(DTYPES.get(weight_dtype, torch.float32))
    whole = pack(rows, weight_dtype)
    apart = torch.full((3, 2, whole.shape[1]), 7, dtype=torch.uint8)
    kernels().pack(rows, weight_dtype, apart[:, 0])

    assert torch.equal(apart[:, 0], whole)
    assert bool((apart[:, 1] == 7).all())


def test_float16_stays_what_it_is_to_the_bit():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    finite = bits[torch.isfinite(values)].view(torch.float16)  # subnormal ones and both zeros too
    rows = finite[: finite.numel() // 1024 * 1024].view(16, -1)

    assert torch.equal(pack(rows, "fp16").view(torch.int16), rows.contiguous().view(torch.int16).view(1, -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [(0, 0), (7, 99), (31, 63)])
def test_float16_that_is_not_finite_is_refused(value, at):
    rows = torch.zeros(32, 100, dtype=torch.float16)
    rows[at] = value
    with pytest.raises(ValueError, match="non-finite"):
        pack(rows, "fp16")


def test_other_numbers_do_not_become_float16():
    with pytest.raises(ValueError, match="only float16 rows are kept as fp16"):
        pack(torch.zeros(16, 64), "fp16")
