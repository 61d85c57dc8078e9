"""The slow, obvious reading of coded weights: one line of text in cpu_kernels/formats/base.py, one line here.

Written by hand beside that description and without it, so that a wrong table there cannot agree with itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEATURES, GROUP, LINE = 16, 64, 64
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Form(NamedTuple):
    """Bits of a code, inputs and header lines of a superblock, header, what is taken from codes, their table of whole
    numbers, their table of others; of "e4m3" codes are float8."""

    bits: int
    inputs: int
    header_lines: int
    header: str
    offset: int = 0
    table: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    e4m3: bool = False

    @property
    def has_zero_points(self) -> bool:
        """Whether a header holds zero points, which are taken from codes as an offset is."""
        return self.header.startswith(("SZ", "SI"))

    @property
    def is_whole(self) -> bool:
        """Whether codes stand for whole numbers of a byte."""
        return not self.values and not self.e4m3


FORMS = {
    "q4_0": Form(4, 64, 1, "S32", 8),
    "q4_1": Form(4, 64, 2, "SM32"),
    "q5_0": Form(5, 64, 1, "S32", 16),
    "q5_1": Form(5, 64, 2, "SM32"),
    "q4_k": Form(4, 256, 5, "K2M32"),
    "q5_k": Form(5, 256, 5, "K2M32"),
    "q6_k": Form(6, 256, 5, "K2S16", 32),
    "iq4_nl": Form(4, 64, 1, "S32", table=IQ4),
    "iq4_xs": Form(4, 256, 3, "K2S32", table=IQ4),
    "int4_g32": Form(4, 256, 6, "SZ32"),
    "int4_g64": Form(4, 256, 3, "SZ64"),
    "int4_g128": Form(4, 128, 1, "SZ128"),
    "uint8_g32": Form(8, 256, 6, "SI32", 128),
    "uint8_g64": Form(8, 256, 3, "SI64", 128),
    "uint8_g128": Form(8, 128, 1, "SI128", 128),
    "mxfp4": Form(4, 128, 1, "E32", table=TWICE_E2M1),
    "nvfp4": Form(4, 256, 5, "T16", table=TWICE_E2M1),
    "nf4": Form(4, 64, 1, "F64", values=NF4),
    "int8": Form(8, 128, 1, "F128", 128),
    "fp8": Form(8, 128, 1, "F128", e4m3=True),
    "fp8_g64": Form(8, 64, 1, "F64", e4m3=True),
    "fp8_g32": Form(8, 64, 2, "F32", e4m3=True),
}


def superblock_bytes(form: Form) -> int:
    """Bytes of one superblock of 16 features."""
    lines = {4: 8, 5: 10, 6: 12, 8: 16}[form.bits]
    return LINE * (form.header_lines + form.inputs // GROUP * lines)


def unpack_form(weight: Tensor, name: str, in_features: int, dtype: torch.dtype) -> Tensor:
    """[num_blocks * 16, in_features] in `dtype` of uint8 [num_blocks, block_bytes] of a form of FORMS."""
    form = FORMS[name]
    blocks, superblocks = weight.shape[0], -(-in_features // form.inputs)
    lines = weight.view(blocks, superblocks, -1, LINE)
    header, code_lines = lines[:, :, : form.header_lines].flatten(2), lines[:, :, form.header_lines :]
    codes = codes_of(code_lines.unflatten(2, (form.inputs // GROUP, -1)), form)  # (block, superblock, feature, input)
    runs = codes.unflatten(-1, (-1, 16)).to(dtype)  # of 16 inputs
    scale, minimum = (part.to(dtype).permute(0, 1, 3, 2)[..., None] for part in _numbers(header, form))
    values = (runs * scale + minimum).flatten(-2).permute(0, 2, 1, 3)
    return values.reshape(blocks * FEATURES, -1)[:, :in_features]


def codes_of(lines: Tensor, form: Form) -> Tensor:
    """Codes [block, superblock, feature, input of the superblock] of uint8 [block, superblock, group, line, 64]."""
    words = lines.unflatten(-1, (FEATURES, 4))  # (block, superblock, group, line, feature, byte)
    if form.bits == 8:
        codes = words.permute(0, 1, 4, 2, 3, 5).flatten(3)
        return codes.view(torch.float8_e4m3fn).float() if form.e4m3 else codes.to(torch.int16) - form.offset
    nibbles = words[:, :, :, :8]
    # (block, superblock, group, line, low or high, feature, byte)
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=4)
    if form.bits > 4:
        bits, lines_each = form.bits - 4, 4 if form.bits == 5 else 2
        shifts = bits * torch.arange(2 * lines_each, dtype=torch.uint8, device=lines.device)
        shifts = shifts.view(lines_each, 2, 1, 1)  # code line of a line of upper bits, low or high
        upper = words[:, :, :, 8:, None, None] >> shifts & ((1 << bits) - 1)
        codes |= upper.flatten(3, 4) << 4
    if form.table:
        codes = torch.tensor(form.table, dtype=torch.int16, device=codes.device)[codes.int()]
    if form.values:
        codes = torch.tensor(form.values, dtype=torch.float32, device=codes.device)[codes.int()]
    codes = codes.permute(0, 1, 5, 2, 3, 4, 6).flatten(3)
    return codes if form.values else codes.to(torch.int16) - form.offset


def _numbers(header: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(scale, minimum), float32 [block, superblock, run of 16 inputs, feature], of uint8 [block, superblock, bytes]."""

    def halves(first: int, count: int) -> Tensor:
        taken = header[..., first : first + 2 * FEATURES * count].contiguous()
        return taken.view(torch.float16).unflatten(-1, (count, FEATURES)).float()

    def numbers(first: int, count: int, signed: bool) -> Tensor:
        taken = header[..., first : first + FEATURES * count].contiguous()
        return (taken.view(torch.int8) if signed else taken).unflatten(-1, (count, FEATURES)).float()

    zero = torch.zeros(1, device=header.device, dtype=torch.float32)
    none = zero.expand(*header.shape[:2], form.inputs // 16, FEATURES)
    if form.header == "S32":
        return halves(0, 2).repeat_interleave(2, 2), none
    if form.header == "SM32":
        return halves(0, 2).repeat_interleave(2, 2), halves(LINE, 2).repeat_interleave(2, 2)
    if form.header == "E32":
        exponents = numbers(0, 4, signed=False)
        return torch.ldexp(torch.ones_like(exponents), exponents - 128).repeat_interleave(2, 2), none
    if form.header.startswith("F"):
        each = int(form.header[1:])
        scale = header.contiguous().view(torch.float32).unflatten(-1, (-1, FEATURES))
        return scale.repeat_interleave(each // 16, 2), none
    if form.header == "T16":
        factor = header[..., :LINE].contiguous().view(torch.float32)[:, :, None]
        scale = header[..., LINE:].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (16, FEATURES)) / 256
        return torch.where(factor < 0, scale / -factor, scale * factor), none
    if form.has_zero_points:
        each = int(form.header[2:])
        groups = form.inputs // each
        scale = halves(0, groups)
        minimum = -numbers(2 * FEATURES * groups, groups, signed=form.header.startswith("SI")) * scale
        return scale.repeat_interleave(each // 16, 2), minimum.repeat_interleave(each // 16, 2)
    if form.header == "K2S16":
        return halves(0, 1) * numbers(LINE, 16, signed=True), none
    if form.header == "K2S32":
        return (halves(0, 1) * numbers(LINE, 8, signed=True)).repeat_interleave(2, 2), none
    scale, minimum = halves(0, 1) * numbers(LINE, 8, signed=False), halves(FEATURES * 2, 1) * numbers(192, 8, False)
    return scale.repeat_interleave(2, 2), -minimum.repeat_interleave(2, 2)
