"""linear: rows of activations times one packed weight, y = x W^T + bias; see layout.py and the two kernel files.

Parameters of every linear kernel, in order: scratch, x, x row stride, rows, in_features, weight, num_blocks,
block_bytes, bias (0: none), out, out row stride, accumulate, inputs per piece, fewest blocks of a range, parts that the
remaining blocks are divided into for the next range. Addresses and strides are in bytes.
"""

import torch

from . import layout
from .checks import check_tensor
from .isa import Isa
from .linear_layout import PIECE_INPUTS, RANGE_BYTES, RECORD_BYTES, STREAM_ROWS, WIDE_PIECE_INPUTS
from .team import Team


def scratch_bytes(isa: Isa, weight_dtype: str, rows: int, in_features: int) -> int:
    """Working memory of one call: the input as the kernel wants it."""
    if weight_dtype == "fp32":
        return 0
    if weight_dtype == "bf16":
        lines = 1 if isa.has_bf16 else 2  # inputs are kept widened where the CPU cannot multiply bf16
        return rows * (lines * -(-in_features // 32) | 1) * 64
    return rows * -(-in_features // layout.GROUP_INPUTS) * RECORD_BYTES


def kernel_of(isa: Isa, weight_dtype: str, rows: int) -> tuple[tuple[str, str], tuple[int, ...]]:
    """(module and factory of the kernel, its [features,] rows of a register tile) for a call of so many rows."""
    if weight_dtype in layout.SUPERBLOCK_LINES:
        return ("linear_q_kernel", "linear_q"), (isa.row_tile if rows > 1 else 1,)
    kernel = ("linear_dot_kernel", "linear_dot")
    if rows == 1:
        return kernel, (1, 1)
    if rows > STREAM_ROWS or not isa.has_avx512:
        return kernel, (isa.dot_features, isa.dot_rows)
    return kernel, (4, 4)


def piece_inputs(isa: Isa, weight_dtype: str) -> int:
    """Inputs that panels of rows are multiplied with at a time."""
    is_wide = weight_dtype == "fp32" or weight_dtype == "bf16" and not isa.has_bf16
    return WIDE_PIECE_INPUTS if is_wide else PIECE_INPUTS


def linear(
    team: Team,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_dtype: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """See CpuKernels.linear."""
    check_tensor("x", x, torch.float32, (None, None))
    rows, in_features = x.shape
    block_bytes = layout.block_bytes(weight_dtype, in_features)
    check_tensor("weight", weight, torch.uint8, (None, block_bytes))
    num_blocks = weight.shape[0]
    if not weight.is_contiguous():
        raise ValueError("weight must be contiguous: blocks are read as one stream")
    check_tensor("out", out, torch.float32, (rows, num_blocks * layout.BLOCK_FEATURES))
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (num_blocks * layout.BLOCK_FEATURES,))
    if rows == 0 or num_blocks == 0:
        return
    kernel, tile = kernel_of(team.isa, weight_dtype, rows)
    team.run(
        (*kernel, team.isa, weight_dtype, *tile),
        scratch_bytes(team.isa, weight_dtype, rows, in_features),
        x.data_ptr(),
        4 * x.stride(0),
        rows,
        in_features,
        weight.data_ptr(),
        num_blocks,
        block_bytes,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        4 * out.stride(0),
        int(accumulate),
        in_features if rows <= STREAM_ROWS else piece_inputs(team.isa, weight_dtype),
        max(1, min(RANGE_BYTES // block_bytes if block_bytes else 1, -(-num_blocks // team.num_threads))),
        2 * team.num_threads if rows <= tile[-1] else num_blocks,  # ranges of several panels of rows stay in cache
    )
