"""Launch shapes of whole_kernel.py, by the format and the rows of a tile."""

from __future__ import annotations

import functools

from gpu_kernels.experts.groups import runs_of, table_words, takes_sums
from gpu_kernels.experts.ordered import WHOLE_FORMS
from gpu_kernels.experts.picks import BLOCKS
from gpu_kernels.forms.unpack import GROUP, superblock_bytes
from gpu_kernels.launching import Shape


@functools.cache
def shape_of(weight_dtype: str, rows: int, has_sources: bool, experts: int) -> Shape:
    """Constants of a kernel: of one pick an expert where `rows` is 1, of tiles of so many else."""
    form = WHOLE_FORMS[weight_dtype]
    runs = runs_of(form.header)
    one = {"UNROLL": 4 if runs < 4 else 2, "num_warps": BLOCKS}  # more under way would spill with as many sums
    own = one if rows == 1 else {"ROWS": rows, "num_warps": max(4, rows // 8), "num_stages": 2}
    words = dict(zip(("T0", "T1", "T2", "T3"), table_words(form.table), strict=True))
    return Shape(
        HAS_SOURCES=has_sources,
        EXPERTS=experts,
        BLOCKS=BLOCKS,
        HEADER=form.header,
        RUNS=runs,
        TAKES_SUMS=takes_sums(form),
        BITS=form.bits,
        OFFSET=0 if form.bits == 8 else form.offset,
        TOGETHER=form.inputs // GROUP,
        HEADER_BYTES=64 * form.header_lines,
        SUPERBLOCK_BYTES=superblock_bytes(form),
        enable_fp_fusion=False,  # what is fused is written so
        **words,
        **own,
    )
