"""expert_linear: checks and launches; see expert_kernel.py."""

import torch
from torch import Tensor

from cpu_kernels.checks import check_tensor, expect
from cpu_kernels.contract import Picks
from cpu_kernels.formats import BLOCK_FEATURES, GROUP_INPUTS, Segment, format_of, segments, unit_blocks, unit_bytes
from cpu_kernels.linear.op import piece_inputs, with_spread_area
from cpu_kernels.linear.sizes import RANGE_BYTES, STREAM_ROWS, record_bytes
from cpu_kernels.team.arguments import EXPERT_LINEAR
from cpu_kernels.team.team import Team
from cpu_kernels.vectors.isa import Isa


def scratch_bytes(isa: Isa, weight_dtype: str, picks: int, in_features: int) -> int:
    """Working memory of one call: the inputs as the kernel wants them, one for each pick."""
    rounds_x_to = format_of(weight_dtype).rounds_x_to
    if rounds_x_to == "int8":
        return picks * -(-in_features // GROUP_INPUTS) * record_bytes(format_of(weight_dtype))
    if rounds_x_to == "bf16":
        return picks * ((1 if isa.has_bf16 else 2) * -(-in_features // 32) | 1) * 64
    return picks * (-(-in_features // 16) | 1) * 64


def kernel_of(isa: Isa, weight_dtype: str, picks: int) -> tuple:
    """(module, factory and parameters of the kernel) for a call of so many picks."""
    if not format_of(weight_dtype).is_row_major:
        return "linear.expert_kernel", "expert_linear_q", isa, weight_dtype, isa.row_tile
    is_large = picks > STREAM_ROWS or not isa.has_avx512
    tile = (isa.dot_features, isa.dot_rows) if is_large else (4, 4)
    return "linear.expert_kernel", "expert_linear_dot", isa, weight_dtype, *tile


def expert_linear(team: Team, x: Tensor, picks: Picks, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    sources, starts, first, _ = picks
    check_tensor("x", x, torch.float32, (None, None))
    in_features = x.shape[1]
    check_tensor("weight", weight, torch.uint8, (None, None, unit_bytes(weight_dtype, in_features)))
    count, units = weight.shape[:2]
    features = units * BLOCK_FEATURES * unit_blocks(weight_dtype)
    check_tensor("out", out, torch.float32, (None, features))
    check_tensor("starts", starts, torch.int32, (None,))
    expect(
        0 <= first and first + count < starts.shape[0],
        f"weight has the experts {first}..{first + count - 1}; starts knows {starts.shape[0] - 1}",
    )
    expect(weight[0:1].is_contiguous(), "an expert's weight must be contiguous: its blocks are read as one stream")
    if sources is None:
        check_tensor("x", x, torch.float32, (out.shape[0], in_features))
    else:
        check_tensor("sources", sources, torch.int32, (out.shape[0],))
    if out.shape[0] == 0 or count == 0 or units == 0:
        return
    parts = segments(weight_dtype, in_features)
    for part in parts:
        _run(team, x, picks, weight, part, units if len(parts) == 1 else part.blocks, out)


def _run(team: Team, x: Tensor, picks: Picks, weight: Tensor, part: Segment, run: int, out: Tensor) -> None:
    """One segment of every unit of every expert."""
    name, (count, features), in_features = part.format.name, out.shape, x.shape[1]
    block_bytes, used_bytes = part.block_bytes, scratch_bytes(team.isa, name, count, in_features)
    size, spread = with_spread_area(team.isa, name, count, used_bytes, team.num_threads)
    team.run(
        kernel_of(team.isa, name, count),
        size,
        *EXPERT_LINEAR.filled(
            x=x.data_ptr(),
            x_row=4 * x.stride(0),
            sources=0 if picks.sources is None else picks.sources.data_ptr(),
            starts=picks.starts.data_ptr(),
            first=picks.first,
            count=weight.shape[0],
            in_features=in_features,
            weight=weight.data_ptr() + part.first_byte,
            expert_bytes=weight.stride(0),
            num_blocks=weight.shape[1] * part.blocks,
            block_bytes=block_bytes,
            bias=0,
            accumulate=0,
            out=out.data_ptr() + 4 * BLOCK_FEATURES * part.first_block,
            out_row=4 * out.stride(0),
            piece=in_features if count <= STREAM_ROWS else piece_inputs(team.isa, name),
            spread=spread,
            smallest=max(1, RANGE_BYTES // block_bytes if block_bytes else 1),
            threads=team.num_threads,
            run=run,
            weight_run=weight.stride(1),
            out_run=4 * features // weight.shape[1],
        ),
    )
