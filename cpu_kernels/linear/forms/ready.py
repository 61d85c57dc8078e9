"""Headers as products of many rows take them: made once for all rows, in working memory, for every 64 inputs.

A line holds a word for each of the 16 features, so that it is used as it lies. Headers of float16 scales stay: to widen
them takes no longer than to read twice as many bytes.

  F32, F16               float32 scales of 32 or 16 inputs, of headers E32 and T16
  P2M32, P2S16, P2S32    float32 d; of P2M32 float32 dmin; of every run of inputs its sub-scale as sums take it, int16
                         twice or int32; of P2M32 the sub-minima of both runs as one int16 pair
"""

from dataclasses import replace

from cpu_kernels.formats import GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.linear.forms.levels import PackedLevels
from cpu_kernels.linear.records import run_of
from cpu_kernels.vectors.header_numbers import exponents, tensor_scales
from cpu_kernels.vectors.vector import I64, store_as

READY = {  # header and its lines
    "E32": ("F32", 2),
    "T16": ("F16", 4),
    "K2M32": ("P2M32", 5),
    "K2S16": ("P2S16", 5),
    "K2S32": ("P2S32", 3),
}


def ready_format(item: WeightFormat) -> WeightFormat:
    """A format with its header ready, if there is such a header; each 64 inputs have one of their own then."""
    if item.header not in READY:
        return item
    header, lines = READY[item.header]
    return replace(item, header=header, header_lines=lines, group_inputs=GROUP_INPUTS)


def store_ready_header(item: WeightFormat, are_pairs: bool, b, superblock, group, to) -> None:
    """The ready header of 64 inputs of a superblock, to an address. are_pairs: of sub-scales."""
    lines = ready_lines(item, are_pairs, b, superblock, group)
    assert len(lines) == READY[item.header][1], item.name
    for place, line in enumerate(lines):
        store_as(b, line, to, LINE_BYTES * place)


def ready_lines(item: WeightFormat, are_pairs: bool, b, superblock, group) -> list:
    """The lines of `store_ready_header`, as registers."""
    runs = range(GROUP_INPUTS // run_of(item))
    if item.header.startswith("K2"):
        levels = PackedLevels(item, are_pairs, b, superblock, group)
        scales = [levels.scale(part) for part in runs]
        return [levels.d(), levels.dmin(), *scales, levels.minima()] if levels.has_minima else [levels.d(), *scales]
    if item.header == "T16":
        scale = tensor_scales(b, superblock, b.add(superblock, b.add(b.mul(group, I64(64)), I64(LINE_BYTES))))
        return [scale(part) for part in runs]
    return [exponents(b, b.add(superblock, b.mul(group, I64(32))), 16 * part) for part in runs]
