"""linear: rows of activations times one packed weight, y = x W^T + bias; see layout.py and the two kernel files.

Parameters of every linear kernel, in order: scratch, x, x row stride, rows, in_features, weight, num_blocks,
block_bytes, bias (0: none), out, out row stride, accumulate, inputs per piece, fewest blocks of a range, parts that the
remaining blocks are divided into for the next range. Addresses and strides are in bytes.
"""

import torch

from . import layout
from .checks import check_tensor
from .linear_layout import PIECE_INPUTS, RANGE_BYTES, RECORD_BYTES, STREAM_ROWS
from .team import Team


def scratch_bytes(weight_dtype: str, rows: int, in_features: int) -> int:
    """Working memory of one call: the input as the kernel wants it."""
    if weight_dtype == "fp32":
        return 0
    if weight_dtype == "bf16":
        return rows * (-(-in_features // 32) | 1) * 64
    return rows * -(-in_features // layout.GROUP_INPUTS) * RECORD_BYTES


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
    quantised = weight_dtype in layout.SUPERBLOCK_LINES
    kernel = ("linear_q_kernel", "linear_q") if quantised else ("linear_dot_kernel", "linear_dot")
    isa = team.isa
    if rows == 1:
        tile = 1
    elif quantised:
        tile = isa.row_tile
    else:
        tile = isa.dot_tile if rows > STREAM_ROWS and weight_dtype == "bf16" else 4
    team.run(
        (*kernel, isa, weight_dtype, tile),
        scratch_bytes(weight_dtype, rows, in_features),
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
        in_features if rows <= STREAM_ROWS else PIECE_INPUTS,
        max(1, min(RANGE_BYTES // block_bytes if block_bytes else 1, -(-num_blocks // team.num_threads))),
        2 * team.num_threads if rows <= tile else num_blocks,  # ranges of several panels of rows stay in cache
    )
