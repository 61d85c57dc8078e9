"""Models that compressed-tensors itself wrote: the values here are those of its own dequantiser, to the bit.

Its dequantiser works in the dtype of the scales. Here a value is the product in float32, which holds it exactly where
codes have at most eight bits and scales are bfloat16; rounded to theirs, it must be theirs. With the file's scales
widened to float32 their dequantiser rounds as we do, and nothing is rounded before values are compared.

Its releases of today write no groups that act-order scattered (actorder "group"); the order called "weight" leaves none.
"""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.checkpoints.loading.numbers import Numbers
from hetero_attn.checkpoints.sources import open_source
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.toy import make_checkpoint
from tests.support.quantised.int4_models import SHAPE, edit_config

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra test-tools)")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

GROUP, CHANNEL, TENSOR = "group", "channel", "tensor"
ODD = {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "intermediate": 320}  # partial blocks of 128


class Case(NamedTuple):
    """form: of the file. weights: what its config says of them. held: the format here. scales: their dtype in the file.
    shape: of the model, where it is another than SHAPE."""

    form: str
    weights: dict
    held: str
    scales: torch.dtype = torch.bfloat16
    shape: dict = {}


def packed(bits: int, held: str, *, symmetric: bool = True, group: int = 0, **more) -> Case:
    way = {"strategy": GROUP, "group_size": group} if group else {"strategy": CHANNEL}
    return Case("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, **way, **more}, held)


def float8(strategy: str, **more) -> Case:
    return Case("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy}, "fp8", **more)


def float8_blocks(**more) -> Case:
    case = float8("block", **more)
    return case._replace(weights=case.weights | {"block_structure": [128, 128]})


W8A8 = {"num_bits": 8, "type": "int", "strategy": CHANNEL}
CASES = {
    "int4 groups": packed(4, "int4_g128", group=128),
    "int4 groups, float16 scales": packed(4, "int4_g32", group=32)._replace(scales=torch.float16),
    "int4 groups, asymmetric": packed(4, "int4_g64", group=64, symmetric=False),
    "int4 groups, act-order": packed(4, "int4_g32", group=32, symmetric=False, actorder="weight"),
    "int4 rows": packed(4, "int4_g128"),
    "int4 rows, asymmetric": packed(4, "int4_g128", symmetric=False),
    "int8 groups": packed(8, "int8", group=128),
    "int8 groups, asymmetric": packed(8, "uint8_g32", group=32, symmetric=False),
    "int8 rows": packed(8, "int8"),
    "int8 rows, asymmetric": packed(8, "uint8_g128", symmetric=False),
    "fp8 tensor": float8(TENSOR),
    "fp8 tensor, float32 scale": float8(TENSOR, scales=torch.float32),
    "fp8 rows": float8(CHANNEL),
    "fp8 rows, float32 scales": float8(CHANNEL, scales=torch.float32),
    "fp8 blocks": float8_blocks(),
    "fp8 blocks, float32 scales": float8_blocks(scales=torch.float32),
    "fp8 partial blocks": float8_blocks(shape=ODD),
    "w8a8": Case("int-quantized", W8A8, "int8"),
    "w8a8, float32 scales": Case("int-quantized", W8A8, "int8", torch.float32),
    "w8a8, asymmetric": Case("int-quantized", W8A8 | {"symmetric": False}, "uint8_g128"),
    "nvfp4": Case(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "nvfp4",
        torch.float32,
    ),
    "mxfp4": Case(
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": GROUP, "group_size": 32},
        "mxfp4",
        torch.float32,
    ),
}


def extremes(values: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, largest) of what shares a scale, in the shape of the scales."""
    if args.strategy == TENSOR:
        return values.min().view(1), values.max().view(1)
    high, wide = args.block_structure or (1, args.group_size or values.shape[1])
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % wide, 0, -values.shape[0] % high))
    blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def compressed(values: torch.Tensor, scheme: QuantizationScheme, form: str, scales: torch.dtype) -> dict:
    """The tensors that their compressor makes of a weight, with scales that are fitted as they do it."""
    args, least_and_most, factor = scheme.weights, extremes(values, scheme.weights), {}
    if args.strategy == "tensor_group":
        factor = {"weight_global_scale": generate_gparam(values.min(), values.max())}
    scale, zeros = calculate_qparams(*least_and_most, args, *factor.values())
    parts = {"weight": values, "weight_scale": scale.to(scales), "weight_zero_point": zeros} | factor
    return BaseCompressor.get_value_from_registry(form).compress(parts, scheme)


def decompressed(parts: dict, scheme: QuantizationScheme, form: str) -> torch.Tensor:
    """The weight by their decompressor, in its own dtype."""
    return BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]


def in_float32(parts: dict, scheme: QuantizationScheme, form: str) -> torch.Tensor:
    """The same, by float32 scales. Their decompressor of NVFP4 ends with bfloat16 whatever its scales are: what it calls
    is called here."""
    wide = parts | {"weight_scale": parts["weight_scale"].float()}
    if form != "nvfp4-pack-quantized":
        return decompressed(wide if parts["weight_scale"].dtype != torch.uint8 else parts, scheme, form).float()
    rows, columns = parts["weight_packed"].shape
    codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * columns, torch.float32)
    return dequantize(codes, wide["weight_scale"], None, scheme.weights, torch.float32, parts["weight_global_scale"])


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """(case, folder of the model, scheme, tensors of each linear by its name)."""
    case = CASES[request.param]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**case.weights))
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "theirs", "llama", **SHAPE | {"layers": 1} | case.shape)
    tensors, linears = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        prefix = name.removesuffix("weight")
        linears[name] = compressed(tensors.pop(name), scheme, case.form, case.scales)
        tensors |= {f"{prefix}{part}": item.contiguous() for part, item in linears[name].items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=case.form, ignore=["lm_head"])
    edit_config(folder, quantization_config=config.model_dump(mode="json"))
    return case, folder, scheme, linears


def test_values_are_those_of_their_dequantiser_to_the_bit(written):
    case, folder, scheme, linears = written

    assert len(linears) == 7
    with open_source(folder) as source:
        for name, parts in linears.items():
            ours = Numbers(source, kernels()).matrix(name)
            theirs = decompressed(parts, scheme, case.form)

            assert source.dtype(name) == case.held
            assert torch.equal(ours.to(theirs.dtype), theirs), name
            assert torch.equal(ours, in_float32(parts, scheme, case.form)), name
