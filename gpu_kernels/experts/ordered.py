"""Products of whole-number weights and activations in the one order of float32 operations that every lane keeps.

    total   of 64 inputs: the exact integer dot products of the runs that share a scale, run after run, the first times
            its scale, each other one by a fused multiply-add; then minima times the exact sums of the inputs, likewise
    result  = fma(total, scale of the 64 activations, result), ascending

Sub-scales that are whole numbers meet the dot products as integers. So a result is the same bits wherever it is
computed, and which lane an expert is on cannot change a token. In plain torch, slow and obvious: the oracle of the CPU
kernels and of those in Triton, and what an emulated GPU computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.forms.unpack import FEATURES, FORMS, GROUP, LINE, Form, codes_of

WHOLE_FORMS = {
    "q4": Form(4, 64, 1, "SM64"),
    "q8": Form(8, 64, 1, "S32", 128),
    **{name: form for name, form in FORMS.items() if form.is_whole},
}

LOST_BITS, HALFWAY = (1 << 29) - 1, 1 << 28  # of a float64 that is made a float32
LEAST_NORMAL = 2.0**-126  # of float32


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float32, rounded once.

    The product is exact in float64, and the sum on the right side of what lies halfway between two float32, if it is
    not just there. There, and where float32 has fewer bits, it is rounded to odd, which a second rounding cannot shift.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    is_close = ((total.view(torch.int64) & LOST_BITS) == HALFWAY) | (total.abs() < LEAST_NORMAL)
    return (_rounded_to_odd(product, addend, total) if is_close.any() else total).float()


def _rounded_to_odd(product: Tensor, addend: Tensor, total: Tensor) -> Tensor:
    """`total`, the rounded sum of the others: its last bit is 1 where anything was lost."""
    seen = total - product
    rest = (product - (total - seen)) + (addend - seen)
    is_cut = rest.isfinite() & (rest != 0) & (total.view(torch.int64) % 2 == 0)
    step = torch.where((rest > 0) == (total > 0), 1, -1)
    return torch.where(is_cut, (total.view(torch.int64) + step).view(torch.float64), total)


def exp(x: Tensor) -> Tensor:
    """e^x of float32 by the polynomial of the CPU's kernels, operation by operation."""
    clamped = torch.where(x <= -87.33654, -87.33654, torch.where(x >= 88.72283, 88.72283, x))
    k = torch.round(clamped * 1.4426950408889634)
    r = fma(k, x.new_tensor(-0.693145751953125), clamped)
    r = fma(k, x.new_tensor(-1.4286068203094173e-06), r)
    p = torch.full_like(x, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, x.new_tensor(coefficient))
    p = fma(p, r * r, r) + 1.0
    power = k.nan_to_num(0.0).int()
    half = power >> 1
    for each in (half, power - half):
        p = p * torch.ldexp(torch.ones_like(p), each)
    return torch.where(x < -87.33654, 0.0, p)


def whole_linear(q: Tensor, scale: Tensor, weight: Tensor, name: str) -> Tensor:
    """float32 [rows, num_blocks * 16] of int8 q [rows, groups, 64] with float32 scales [rows, groups], and packed
    blocks uint8 [num_blocks, block_bytes] of a format of WHOLE_FORMS."""
    form, groups = WHOLE_FORMS[name], q.shape[1]
    lines = weight.view(weight.shape[0], -1, form.header_lines + form.inputs // GROUP * code_lines(form), LINE)
    header = lines[:, :, : form.header_lines].flatten(2)
    codes = codes_of(lines[:, :, form.header_lines :].unflatten(2, (form.inputs // GROUP, -1)), form)
    # (block, superblock, feature, input) -> (feature of all, group, run of 16, input)
    codes = codes.permute(0, 2, 1, 3).reshape(weight.shape[0] * FEATURES, -1, 4, 16)[:, :groups]
    runs = q.view(q.shape[0], groups, 4, 16)
    dots = torch.einsum("rgsi,fgsi->grsf", runs.double(), codes.double()).long()  # exact
    sums = runs.long().sum(-1).permute(1, 0, 2)[..., None]  # (group, row, run, 1)
    result = torch.zeros(q.shape[0], codes.shape[0], dtype=torch.float32, device=q.device)
    for group in range(groups):
        inside = header[:, group * GROUP // form.inputs]
        factor = scale[:, group, None]
        result = _add_group(result, dots[group], sums[group], factor, inside, group % (form.inputs // GROUP), form)
    return result


def code_lines(form: Form) -> int:
    """Lines of 64 bytes that the codes of 64 inputs take."""
    return {4: 8, 5: 10, 6: 12, 8: 16}[form.bits]


def _add_group(
    result: Tensor, dots: Tensor, sums: Tensor, factor: Tensor, header: Tensor, inside: int, form: Form
) -> Tensor:
    """`result` and what 64 inputs add; dots: int64 [rows, 4, features], sums: int64 [rows, 4, 1], of 16 inputs each.
    header: uint8 [blocks, bytes] of their superblock, in which they are the 64 inputs number `inside`."""
    at = _Header(header)
    in_halves = dots.unflatten(1, (2, 2)).sum(2), sums.unflatten(1, (2, 2)).sum(2)
    if form.header == "SM64":
        scaled = dots.sum(1).float() * at.half(0)
        return fma(at.half(32), sums.sum(1).float() * factor, fma(scaled, factor, result))
    if form.header.startswith("K2"):
        return fma(_two_levels(dots, in_halves, at, inside, form), factor, result)
    scales: list[Tensor]
    if form.header in ("S32", "SM32"):
        scales = [at.half(32 * run) for run in range(2)]
    elif form.header == "E32":
        scales = [at.power(16 * (2 * inside + run)) for run in range(2)]
    elif form.has_zero_points:
        return fma(_with_zeros(in_halves, at, inside, form), factor, result)
    elif form.header == "T16":
        return fma(_chain(dots, [at.of_tensor(LINE + 16 * (4 * inside + run)) for run in range(4)]), factor, result)
    else:
        return fma(dots.sum(1).float() * at.number(0), factor, result)
    total = _chain(in_halves[0], scales)
    if form.header == "SM32":
        for run in range(2):
            total = fma(in_halves[1][:, run].float(), at.half(LINE + 32 * run), total)
    return fma(total, factor, result)


def _chain(dots: Tensor, scales: list[Tensor]) -> Tensor:
    """dots[:, 0] * scales[0] + ..., one after the other."""
    total = dots[:, 0].float() * scales[0]
    for run, scale in enumerate(scales[1:], 1):
        total = fma(dots[:, run].float(), scale, total)
    return total


def _two_levels(dots: Tensor, in_halves: tuple[Tensor, Tensor], at: _Header, inside: int, form: Form) -> Tensor:
    by_run = dots if form.header == "K2S16" else in_halves[0]
    runs, signed = by_run.shape[1], form.header != "K2M32"
    whole = sum(by_run[:, run] * at.byte(64 + 16 * (runs * inside + run), signed) for run in range(runs))
    total = whole.float() * at.half(0)
    if form.header == "K2M32":
        taken = sum(in_halves[1][:, run] * at.byte(192 + 16 * (2 * inside + run), False) for run in range(2))
        total = fma(taken.float(), -at.half(32), total)
    return total


def _with_zeros(in_halves: tuple[Tensor, Tensor], at: _Header, inside: int, form: Form) -> Tensor:
    each = int(form.header[2:])
    dots, sums = in_halves if each == 32 else (part.sum(1, keepdim=True) for part in in_halves)
    total = None
    for run in range(dots.shape[1]):
        index = (GROUP * inside + 32 * run) // each
        zero = at.byte(32 * form.inputs // each + 16 * index, form.header.startswith("SI"))
        value, scale = (dots[:, run] - zero * sums[:, run]).float(), at.half(32 * index)
        total = value * scale if total is None else fma(value, scale, total)
    return total


class _Header:
    """Numbers of a superblock's header, one for every feature, as rows that broadcast over those of activations."""

    def __init__(self, header: Tensor) -> None:
        self._header = header

    def half(self, first: int) -> Tensor:
        return self._bytes(first, 2).view(torch.float16).float().flatten()

    def number(self, first: int) -> Tensor:
        return self._bytes(first, 4).view(torch.float32).flatten()

    def byte(self, first: int, signed: bool) -> Tensor:
        found = self._bytes(first, 1)
        return (found.view(torch.int8) if signed else found).long().flatten()

    def of_tensor(self, first: int) -> Tensor:
        """A byte E4M3 times or over the number of the tensor."""
        value, factor = self._bytes(first, 1).view(torch.float8_e4m3fn).float().flatten() / 256, self.number(0)
        return torch.where(factor < 0, value / -factor, value * factor)

    def power(self, first: int) -> Tensor:
        exponents = self.byte(first, False).float() - 128
        return torch.ldexp(torch.ones_like(exponents), exponents)

    def _bytes(self, first: int, size: int) -> Tensor:
        return self._header[:, first : first + FEATURES * size].contiguous()
