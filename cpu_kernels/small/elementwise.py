"""Checks and launches of the norms, copies, gated activations, gelu, gathers and merge; their kernels compute."""

import torch
from torch import Tensor

from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import Partial
from cpu_kernels.team.arguments import COPY_ROWS, GATED, GATHER, GELU, LAYER_NORM, MERGE, MERGE_PARTS, RMS_NORM
from cpu_kernels.team.team import Team

NO_PARTIALS = dict.fromkeys((word for word in MERGE._fields if word.startswith("part_")), 0)


def rms_norm(team: Team, x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool) -> None:
    check_tensor("x", x, torch.float32, (None, None))
    rows, hidden = x.shape
    check_tensor("weight", weight, torch.float32, (hidden,))
    check_tensor("out", out, torch.float32, (rows, hidden))
    if rows and hidden:
        team.run(
            ("small.elementwise_kernel", "rms_norm", *([True] if accumulate else [])),
            0,
            *RMS_NORM.filled(
                x=x.data_ptr(),
                x_row=4 * x.stride(0),
                weight=weight.data_ptr(),
                eps=bits_of(eps),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                hidden=hidden,
            ),
        )


def copy_rows(team: Team, target: Tensor, source: Tensor) -> None:
    check_tensor("source", source, torch.float32, (None, None))
    rows, features = source.shape
    check_tensor("target", target, torch.float32, (rows, features))
    if rows and features:
        words = COPY_ROWS.filled(
            source=source.data_ptr(),
            source_row=4 * source.stride(0),
            target=target.data_ptr(),
            target_row=4 * target.stride(0),
            rows=rows,
            features=features,
        )
        team.run(("small.elementwise_kernel", "copy_rows"), 0, *words)


def layer_norm(team: Team, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    check_tensor("x", x, torch.float32, (None, None))
    rows, hidden = x.shape
    check_tensor("weight", weight, torch.float32, (hidden,))
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (hidden,))
    check_tensor("out", out, torch.float32, (rows, hidden))
    if rows and hidden:
        team.run(
            ("small.layer_norm_kernel", "layer_norm", *([] if bias is None else [True])),
            0,
            *LAYER_NORM.filled(
                x=x.data_ptr(),
                x_row=4 * x.stride(0),
                weight=weight.data_ptr(),
                bias=0 if bias is None else bias.data_ptr(),
                eps=bits_of(eps),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                hidden=hidden,
            ),
        )


def gelu(team: Team, x: Tensor, out: Tensor) -> None:
    check_tensor("x", x, torch.float32, (None, None))
    rows, features = x.shape
    check_tensor("out", out, torch.float32, (rows, features))
    if rows and features:
        words = GELU.filled(
            x=x.data_ptr(),
            x_row=4 * x.stride(0),
            out=out.data_ptr(),
            out_row=4 * out.stride(0),
            rows=rows,
            features=features,
        )
        team.run(("small.elementwise_kernel", "gelu"), 0, *words)


def gather_columns(team: Team, x: Tensor, order: Tensor, out: Tensor) -> None:
    check_tensor("x", x, torch.float32, (None, None))
    rows, features = x.shape
    check_tensor("order", order, torch.int32, (features,))
    check_tensor("out", out, torch.float32, (rows, features))
    if rows and features:
        words = GATHER.filled(
            x=x.data_ptr(),
            x_row=4 * x.stride(0),
            order=order.data_ptr(),
            out=out.data_ptr(),
            out_row=4 * out.stride(0),
            rows=rows,
            features=features,
        )
        team.run(("small.elementwise_kernel", "gather_columns"), 0, *words)


def gated(team: Team, name: str, gate_up: Tensor, out: Tensor) -> None:
    """silu_mul or gelu_mul; name: of the kernel."""
    check_tensor("gate_up", gate_up, torch.float32, (None, None))
    rows, width = gate_up.shape
    expect(width % 32 == 0, f"gate_up has {width} columns; it must be whole units of 16 gate and 16 up columns")
    check_tensor("out", out, torch.float32, (rows, width // 2))
    if rows and width:
        team.run(
            ("small.elementwise_kernel", name),
            0,
            *GATED.filled(
                gate_up=gate_up.data_ptr(),
                gate_up_row=4 * gate_up.stride(0),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                units=width // 32,
            ),
        )


def merge(team: Team, partials: list[Partial], into: Partial) -> None:
    expect(bool(partials), "merge needs at least one partial")
    out, lse = into
    shape = tuple(out.shape)
    check_tensor("into.out", out, torch.float32, shape)
    check_tensor("into.lse", lse, torch.float32, shape[:-1])
    for index, partial in enumerate(partials):
        check_tensor(f"partials[{index}].out", partial.out, torch.float32, shape)
        check_tensor(f"partials[{index}].lse", partial.lse, torch.float32, shape[:-1])
    if out.numel() == 0:
        return
    parts = [Partial(part.contiguous(), part_lse.contiguous()) for part, part_lse in partials]
    to = out if out.is_contiguous() else torch.empty(shape, dtype=torch.float32, device="cpu")
    lse_to = lse if lse.is_contiguous() else torch.empty(shape[:-1], dtype=torch.float32, device="cpu")
    copies = [part for part, own in zip(parts, partials) if part.out is not own.out or part.lse is not own.lse]
    if team.is_recording:
        expect(not copies and to is out and lse_to is lse, "merge can be recorded with contiguous tensors only")
    while parts:
        taken, parts = parts[:MERGE_PARTS], parts[MERGE_PARTS:]
        places = {f"part_{index}": part.data_ptr() for index, (part, _) in enumerate(taken)}
        places |= {f"part_lse_{index}": part_lse.data_ptr() for index, (_, part_lse) in enumerate(taken)}
        words = MERGE.filled(
            count=len(taken),
            out=to.data_ptr(),
            lse=lse_to.data_ptr(),
            rows=lse_to.numel(),
            head_dim=shape[-1],
            **NO_PARTIALS | places,
        )
        team.run(("small.elementwise_kernel", "merge"), 0, *words)
        # A row reads all its inputs before it is written, so what is merged so far may be an input of the next round.
        parts = [Partial(to, lse_to), *parts] if parts else []
    if to is not out:
        out.copy_(to)
    if lse_to is not lse:
        lse.copy_(lse_to)
