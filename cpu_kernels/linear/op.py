"""linear: rows of activations times one packed weight, y = x W^T + bias; see formats/weights.py and the two kernel
files.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from cpu_kernels.checks import check_tensor
from cpu_kernels.formats import (
    BLOCK_FEATURES,
    GROUP_INPUTS,
    LINE_BYTES,
    Segment,
    format_of,
    segments,
    unit_blocks,
    unit_bytes,
)
from cpu_kernels.linear.sizes import (
    FILLED_ROWS,
    NUMBER_BLOCKS,
    PIECE_INPUTS,
    RANGE_BYTES,
    SPREAD_BYTES,
    STREAM_ROWS,
    WIDE_PIECE_INPUTS,
    record_bytes,
    shares_inputs,
    spread_rows,
)
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.team import Team
from cpu_kernels.vectors.isa import Isa


def scratch_bytes(isa: Isa, weight_dtype: str, rows: int, in_features: int) -> int:
    """Working memory of one call: the input as the kernel wants it."""
    item = format_of(weight_dtype)
    rounds_x_to = item.rounds_x_to
    if rounds_x_to == "fp32":
        return 0
    if rounds_x_to == "bf16":
        lines = 1 if isa.has_bf16 else 2  # inputs are kept widened where the CPU cannot multiply bf16
        return (rows + filled_rows(weight_dtype)) * (lines * -(-in_features // 32) | 1) * 64
    return (rows + filled_rows(weight_dtype)) * -(-in_features // GROUP_INPUTS) * record_bytes(item)


def is_one_panel(weight_dtype: str, rows: int, tile: int) -> bool:
    """Whether so many rows are one panel of a register tile of `tile` rows (`panel_of`, `rows_over_range`)."""
    panel = 1 << (rows - 1).bit_length()
    return rows <= tile and panel - rows <= min(filled_rows(weight_dtype), (panel - 1) // 2)


def filled_rows(weight_dtype: str) -> int:
    """How many rows of a panel may be computed for nothing; inputs that are read where they are have none behind
    them."""
    return 0 if weight_dtype in ("fp32", "fp16") else FILLED_ROWS.get(weight_dtype, 1)


def kernel_of(isa: Isa, weight_dtype: str, rows: int) -> tuple[tuple[str, str], tuple[int, ...]]:
    """(module and factory of the kernel, its [features,] rows of a register tile) for a call of so many rows."""
    if not format_of(weight_dtype).is_row_major:
        return ("linear.q_kernel", "linear_q"), (isa.row_tile if rows > 1 else 1,)
    kernel = ("linear.dot_kernel", "linear_dot")
    if rows == 1:
        return kernel, (1, 1)
    if rows > STREAM_ROWS or not isa.has_avx512:
        return kernel, (isa.dot_features, isa.dot_rows)
    return kernel, (4, 4)


def with_spread_area(isa: Isa, weight_dtype: str, rows: int, used_bytes: int, threads: int) -> tuple[int, int]:
    """(working memory, where in it, behind what is used, codes are spread or 0) of a call of so many rows."""
    least_rows = spread_rows(isa, format_of(weight_dtype))
    if not least_rows or rows < least_rows:
        return used_bytes, 0
    spread = -(-used_bytes // LINE_BYTES) * LINE_BYTES
    return spread + threads * SPREAD_BYTES, spread


def piece_inputs(isa: Isa, weight_dtype: str) -> int:
    """Inputs that panels of rows are multiplied with at a time."""
    is_wide = weight_dtype in ("fp32", "fp16") or weight_dtype == "bf16" and not isa.has_bf16
    return WIDE_PIECE_INPUTS if is_wide else PIECE_INPUTS


class Call(NamedTuple):
    """What a call is by its shape alone: its kernel, as Team.run takes it, its working memory and where in it codes are
    spread, the inputs that panels of rows are multiplied with at a time, whether its rows are one panel, and how many
    blocks share what is made of the inputs."""

    kernel: tuple
    scratch_bytes: int
    spread: int
    piece: int
    is_one_panel: bool
    sharing_blocks: int

    def smallest_range(self, num_blocks: int, block_bytes: int, threads: int) -> int:
        """Fewest blocks that a thread takes at a time."""
        of_bytes = RANGE_BYTES // block_bytes if block_bytes else 1
        sharing = min(self.sharing_blocks, num_blocks // (4 * threads))
        return max(1, sharing, min(of_bytes, -(-num_blocks // threads)))


@lru_cache(maxsize=1024)
def _call_of(isa: Isa, threads: int, weight_dtype: str, rows: int, in_features: int) -> Call:
    kernel, tile = kernel_of(isa, weight_dtype, rows)
    size, spread = with_spread_area(
        isa, weight_dtype, rows, scratch_bytes(isa, weight_dtype, rows, in_features), threads
    )
    return Call(
        kernel=(*kernel, isa, weight_dtype, *tile),
        scratch_bytes=size,
        spread=spread,
        piece=in_features if rows <= STREAM_ROWS else piece_inputs(isa, weight_dtype),
        is_one_panel=is_one_panel(weight_dtype, rows, tile[-1]),
        sharing_blocks=NUMBER_BLOCKS if spread and shares_inputs(isa, format_of(weight_dtype)) else 1,
    )


def linear(
    team: Team,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_dtype: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    check_tensor("x", x, torch.float32, (None, None))
    rows, in_features = x.shape
    check_tensor("weight", weight, torch.uint8, (None, unit_bytes(weight_dtype, in_features)))
    units, features = weight.shape[0], BLOCK_FEATURES * unit_blocks(weight_dtype)
    if not weight.is_contiguous():
        raise ValueError("weight must be contiguous: blocks are read as one stream")
    check_tensor("out", out, torch.float32, (rows, units * features))
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (units * features,))
    if rows == 0 or units == 0:
        return
    parts = segments(weight_dtype, in_features)
    for part in parts:
        run = units if len(parts) == 1 else part.blocks
        _run(team, Operands(x, weight, bias, out, accumulate), part, run)


class Operands(NamedTuple):
    """What `contract.Ops.linear` is given."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    accumulate: bool


def _run(team: Team, operands: Operands, part: Segment, run: int) -> None:
    """One segment of every unit of the weight; run: its blocks that follow each other."""
    x, weight, bias, out, accumulate = operands
    name, (rows, in_features) = part.format.name, x.shape
    num_blocks, block_bytes = weight.shape[0] * part.blocks, part.block_bytes
    call = _call_of(team.isa, team.num_threads, name, rows, in_features)
    first_out = LINE_BYTES * part.first_block  # 16 float32
    team.run(
        call.kernel,
        call.scratch_bytes,
        *LINEAR.filled(
            x=x.data_ptr(),
            x_row=4 * x.stride(0),
            rows=rows,
            in_features=in_features,
            weight=weight.data_ptr() + part.first_byte,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            bias=0 if bias is None else bias.data_ptr() + first_out,
            out=out.data_ptr() + first_out,
            out_row=4 * out.stride(0),
            accumulate=int(accumulate),
            piece=call.piece,
            spread=call.spread,
            smallest=call.smallest_range(num_blocks, block_bytes, team.num_threads),
            # Ranges of several panels of rows stay in cache.
            parts=2 * team.num_threads if call.is_one_panel else num_blocks,
            run=run,
            weight_run=weight.stride(0),
            out_run=4 * out.shape[1] // weight.shape[0],  # bytes of a unit's outputs
        ),
    )
