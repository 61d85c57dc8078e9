"""Linears as FP8, int8, MXFP4, NVFP4 and NF4 files have them, written code by code from the published layouts.

Each writer takes the shape of a weight and a generator and returns its tensors by suffix and the float32 values that
they stand for. A model of them is written beside a plain one of the same values.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.formats import NF4_VALUES
from tests.support.models.toy import make_checkpoint
from tests.support.quantised.int4_models import SHAPE, edit_config, words

Tensors = dict[str, torch.Tensor]
Writer = Callable[[int, int, torch.Generator], tuple[Tensors, torch.Tensor]]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Scales, none near zero."""
    return torch.rand(*shape, generator=generator) + 0.5


def e4m3(out: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of the format, their subnormals among them."""
    return (torch.randn(out, inputs, generator=generator) * 0.1).to(torch.float8_e4m3fn)


def fp8_tensor(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = e4m3(out, inputs, generator), uniform(generator, 1)[0]
    return {"weight": codes, "weight_scale": scale, "input_scale": scale}, codes.float() * scale


def fp8_channel(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = e4m3(out, inputs, generator), uniform(generator, out, 1)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_blocks(high: int, wide: int, dtype: torch.dtype = torch.float32) -> Writer:
    """DeepSeek's; the last blocks may be partial. dtype float8_e8m0fnu: powers of two."""

    def write(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, scale = e4m3(out, inputs, generator), uniform(generator, -(-out // high), -(-inputs // wide)).to(dtype)
        each = scale.float().repeat_interleave(high, 0)[:out].repeat_interleave(wide, 1)[:, :inputs]
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * each

    return write


def int8_channel(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """W8A8."""
    codes = torch.randint(-127, 128, (out, inputs), generator=generator).to(torch.int8)
    scale = (uniform(generator, out, 1) / 1000).bfloat16()
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def int8_packed(each: int, symmetric: bool = True, scales: torch.dtype = torch.float16) -> Writer:
    """compressed-tensors with 8 bits in words."""

    def write(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = torch.randint(-128, 128, (out, inputs), generator=generator)
        zeros = torch.randint(-9, 9, (out, inputs // each), generator=generator)
        scale = (uniform(generator, out, inputs // each) / 1000).to(scales)
        parts = {"weight_packed": bytes_in_words(codes + 128), "weight_scale": scale}
        parts["weight_shape"] = torch.tensor([out, inputs])
        if symmetric:
            zeros = zeros * 0
        else:
            parts["weight_zero_point"] = bytes_in_words((zeros + 128).t()).t().contiguous()
        values = (codes - zeros.repeat_interleave(each, 1)).float() * scale.float().repeat_interleave(each, 1)
        return parts, values

    return write


def bytes_in_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] of codes 0..255 [rows, 4n], the first in the lowest bits."""
    low, high = codes & 15, codes >> 4
    return words(torch.stack((low, high), -1).flatten(1))


def e2m1_codes(out: int, inputs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [out, in / 2], the even one low; values)."""
    codes = torch.randint(16, (out, inputs), generator=generator)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes]


def mxfp4(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, values = e2m1_codes(out, inputs, generator)
    exponents = torch.randint(118, 125, (out, inputs // 32), generator=generator).to(torch.uint8)
    scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127).repeat_interleave(32, 1)
    return {"weight_packed": codes, "weight_scale": exponents}, values * scale


def nvfp4(model_opt: bool) -> Writer:
    """ModelOpt's factor multiplies, compressed-tensors' divides."""

    def write(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, values = e2m1_codes(out, inputs, generator)
        scale = (uniform(generator, out, inputs // 16) * 100).to(torch.float8_e4m3fn)
        factor = uniform(generator, 1) * (1e-4 if model_opt else 1e4)
        each = scale.float() * factor if model_opt else scale.float() / factor
        if model_opt:
            parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": factor[0]}
        else:
            parts = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": factor}
        return parts, values * each.repeat_interleave(16, 1)

    return write


def nf4(nested: bool) -> Writer:
    """bitsandbytes: flat, the first of two codes in the upper half."""

    def write(out: int, inputs: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, count = torch.randint(16, (out * inputs,), generator=generator), out * inputs // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, inputs]}
        parts = {"weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]}
        if nested:
            table, outer = torch.randn(256, generator=generator) / 100, uniform(generator, -(-count // 256))
            small = torch.randint(256, (count,), generator=generator)
            absmax = table[small] * outer.repeat_interleave(256)[:count] + 0.25
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            parts |= {"weight.absmax": small.to(torch.uint8), "weight.nested_absmax": outer}
            parts["weight.nested_quant_map"] = table
        else:
            absmax = uniform(generator, count) / 10
            parts["weight.absmax"] = absmax
        parts["weight.quant_map"] = torch.tensor(NF4_VALUES)
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts, (torch.tensor(NF4_VALUES)[codes] * absmax.repeat_interleave(64)).view(out, inputs)

    return write


def compressed_config(form: str, **weights) -> dict:
    """Of one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def make_scaled(folder: Path, writers: dict[str, Writer], config: dict, *, plain: Path | None = None, **shape) -> Path:
    """Write `folder`/scaled and `folder`/plain, the same values in float32; returns `folder`.

    plain: a checkpoint that is there already, in the place of `folder`/plain.

    writers: by the last part of a linear's name, "" for the others; one that is None leaves the linear plain.
    """
    plain = plain or make_checkpoint(folder / "plain", "llama", **SHAPE | shape)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        short = name.split(".")[-2].removesuffix("_proj")
        writer = writers.get(short, writers[""]) if "_proj" in name and name.endswith(".weight") else None
        if writer is None:
            stored[name] = values.bfloat16() if values.dim() > 1 else values
            tensors[name] = stored[name].float()
            continue
        parts, tensors[name] = writer(*values.shape, torch.Generator().manual_seed(seed))
        stored |= {f"{name.removesuffix('weight')}{part}": item.contiguous() for part, item in parts.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    target = folder / "scaled"
    target.mkdir()
    for file in plain.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file({name: item.clone() for name, item in stored.items()}, target / "model.safetensors", {"format": "pt"})
    edit_config(target, quantization_config=config)
    return folder
