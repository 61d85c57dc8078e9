"""pack: the bytes of the layout, the quality of quantisation, and what it refuses."""

import pytest
import torch

from cpu_kernels.formats import weights as layout
from tests.support.cpu_oracles import kernels, nmse, pack, unpack

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
