"""clamped_silu_mul, add_expert_bias, add_sinks, sigmoid_mul: checks and launches; expert_terms_kernel.py computes."""

import torch
from torch import Tensor

from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import Partial, Picks
from cpu_kernels.team.arguments import CLAMPED, EXPERT_BIAS, SIGMOID_MUL, SINKS
from cpu_kernels.team.team import Team


def clamped_silu_mul(team: Team, gate_up: Tensor, alpha: float, limit: float, out: Tensor) -> None:
    check_tensor("gate_up", gate_up, torch.float32, (None, None))
    rows, width = gate_up.shape
    expect(width % 32 == 0, f"gate_up has {width} columns; it must be whole units of 16 gate and 16 up columns")
    expect(limit >= 0, f"limit is {limit}; it must not be below 0")
    check_tensor("out", out, torch.float32, (rows, width // 2))
    if rows and width:
        team.run(
            ("small.expert_terms_kernel", "clamped_silu_mul"),
            0,
            *CLAMPED.filled(
                gate_up=gate_up.data_ptr(),
                gate_up_row=4 * gate_up.stride(0),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                units=width // 32,
                alpha=bits_of(alpha),
                limit=bits_of(limit),
            ),
        )


def add_expert_bias(team: Team, bias: Tensor, picks: Picks, out: Tensor) -> None:
    check_tensor("bias", bias, torch.float32, (None, None))
    count, features = bias.shape
    check_tensor("out", out, torch.float32, (None, features))
    check_tensor("starts", picks.starts, torch.int32, (None,))
    expect(
        0 <= picks.first and picks.first + count < picks.starts.shape[0],
        f"bias has the experts {picks.first}..{picks.first + count - 1}; starts knows {picks.starts.shape[0] - 1}",
    )
    if out.numel() and count:
        team.run(
            ("small.expert_terms_kernel", "add_expert_bias"),
            0,
            *EXPERT_BIAS.filled(
                bias=bias.data_ptr(),
                bias_row=4 * bias.stride(0),
                starts=picks.starts.data_ptr(),
                first=picks.first,
                count=count,
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                features=features,
            ),
        )


def add_sinks(team: Team, sinks: Tensor, into: Partial) -> None:
    out, lse = into
    check_tensor("out", out, torch.float32, (None, None, None))
    rows, heads, head_dim = out.shape
    check_tensor("lse", lse, torch.float32, (rows, heads))
    check_tensor("sinks", sinks, torch.float32, (heads,))
    if out.numel():
        team.run(
            ("small.expert_terms_kernel", "add_sinks"),
            0,
            *SINKS.filled(
                sinks=sinks.data_ptr(),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                out_head=4 * out.stride(1),
                lse=lse.data_ptr(),
                lse_row=4 * lse.stride(0),
                rows=rows,
                heads=heads,
                head_dim=head_dim,
            ),
        )


def sigmoid_mul(team: Team, gate: Tensor, out: Tensor) -> None:
    check_tensor("out", out, torch.float32, (None, None, None))
    rows, units, features = out.shape
    check_tensor("gate", gate, torch.float32, (rows, units, features))
    if out.numel():
        team.run(
            ("small.expert_terms_kernel", "sigmoid_mul"),
            0,
            *SIGMOID_MUL.filled(
                gate=gate.data_ptr(),
                gate_row=4 * gate.stride(0),
                gate_unit=4 * gate.stride(1),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                out_unit=4 * out.stride(1),
                rows=rows,
                units=units,
                features=features,
            ),
        )
