"""rms_norm, silu_mul, rope_append and merge: checks and launches; the arithmetic is in elementwise_kernel.py."""

import torch

from .attention import KV_DTYPES, bits_of, check_pages
from .checks import check_tensor, expect
from .elementwise_layout import MERGE_PARTS
from .team import Team


def rms_norm(team: Team, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See CpuKernels.rms_norm."""
    check_tensor("x", x, torch.float32, (None, None))
    rows, hidden = x.shape
    check_tensor("weight", weight, torch.float32, (hidden,))
    check_tensor("out", out, torch.float32, (rows, hidden))
    if rows and hidden:
        team.run(
            ("elementwise_kernel", "rms_norm"),
            0,
            x.data_ptr(),
            4 * x.stride(0),
            weight.data_ptr(),
            bits_of(eps),
            out.data_ptr(),
            4 * out.stride(0),
            rows,
            hidden,
        )


def silu_mul(team: Team, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """See CpuKernels.silu_mul."""
    check_tensor("gate_up", gate_up, torch.float32, (None, None))
    rows, width = gate_up.shape
    expect(width % 32 == 0, f"gate_up has {width} columns; it must be whole units of 16 gate and 16 up columns")
    check_tensor("out", out, torch.float32, (rows, width // 2))
    if rows and width:
        team.run(
            ("elementwise_kernel", "silu_mul"),
            0,
            gate_up.data_ptr(),
            4 * gate_up.stride(0),
            out.data_ptr(),
            4 * out.stride(0),
            rows,
            width // 32,
        )


def rope_append(
    team: Team,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See CpuKernels.rope_append."""
    check_tensor("qkv", qkv, torch.float32, (None, None, None))
    rows, groups, unit_features = qkv.shape
    check_tensor("q", q, torch.float32, (rows, None, None))
    _, num_heads, head_dim = q.shape
    expect(groups > 0 and num_heads % groups == 0, f"{num_heads} query heads do not divide over {groups} KV heads")
    group_heads = num_heads // groups
    expect(
        unit_features >= (group_heads + 2) * head_dim,
        f"qkv has {unit_features} features per group; {group_heads} query heads, k and v of {head_dim} need more",
    )
    kv_dtype = check_pages(k_pages, v_pages, head_dim)
    check_tensor("positions", positions, torch.int64, (rows,))
    check_tensor("cos", cos, torch.float32, (None, None))
    check_tensor("sin", sin, torch.float32, tuple(cos.shape))
    max_positions, half = cos.shape
    expect(2 * half <= head_dim, f"cos has {half} columns; rotary_dim {2 * half} is more than head_dim {head_dim}")
    expect(cos.stride(0) == sin.stride(0), "cos and sin must have the same row stride")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, torch.float32, (head_dim,))
    check_tensor("slots", slots, torch.int64, (rows, groups))
    if rows == 0:
        return
    num_pages, page_size, _ = k_pages.shape
    item = k_pages.element_size()
    failure = team.run(
        ("elementwise_kernel", "rope_append", KV_DTYPES[k_pages.dtype]),
        0,
        qkv.data_ptr(),
        4 * qkv.stride(0),
        4 * qkv.stride(1),
        rows,
        groups,
        group_heads,
        head_dim,
        half,
        positions.data_ptr(),
        max_positions,
        cos.data_ptr(),
        sin.data_ptr(),
        4 * cos.stride(0),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        bits_of(eps),
        q.data_ptr(),
        4 * q.stride(0),
        4 * q.stride(1),
        k_pages.data_ptr(),
        item * k_pages.stride(0),
        item * k_pages.stride(1),
        v_pages.data_ptr(),
        item * v_pages.stride(0),
        item * v_pages.stride(1),
        num_pages * page_size,
        page_size,
        slots.data_ptr(),
        8 * slots.stride(0),
    )
    expect(failure != 1, f"positions must lie in 0..{max_positions - 1}, the rows of cos and sin")
    expect(failure != 2, f"slots must lie in 0..{num_pages * page_size - 1}, the slots of the pages")


def merge(
    team: Team, outs: list[torch.Tensor], lses: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """See CpuKernels.merge."""
    expect(len(outs) == len(lses) > 0, f"merge needs as many outs as lses, at least one: {len(outs)}, {len(lses)}")
    shape = tuple(out.shape)
    check_tensor("out", out, torch.float32, shape)
    check_tensor("lse", lse, torch.float32, shape[:-1])
    for index, (part, part_lse) in enumerate(zip(outs, lses)):
        check_tensor(f"outs[{index}]", part, torch.float32, shape)
        check_tensor(f"lses[{index}]", part_lse, torch.float32, shape[:-1])
    if out.numel() == 0:
        return
    parts = [(part.contiguous(), part_lse.contiguous()) for part, part_lse in zip(outs, lses)]
    to = out if out.is_contiguous() else torch.empty(shape)
    lse_to = lse if lse.is_contiguous() else torch.empty(shape[:-1])
    copies = [pair for pair, own in zip(parts, zip(outs, lses)) if pair[0] is not own[0] or pair[1] is not own[1]]
    if team.is_recording:
        expect(not copies and to is out and lse_to is lse, "merge can be recorded with contiguous tensors only")
    while parts:
        taken, parts = parts[:MERGE_PARTS], parts[MERGE_PARTS:]
        addresses = [tensor.data_ptr() for pair in taken for tensor in pair]
        kernel = ("elementwise_kernel", "merge")
        team.run(kernel, 0, len(taken), to.data_ptr(), lse_to.data_ptr(), lse_to.numel(), shape[-1], *addresses)
        # A row reads all its inputs before it is written, so what is merged so far may be an input of the next round.
        parts = [(to, lse_to), *parts] if parts else []
    if to is not out:
        out.copy_(to)
    if lse_to is not lse:
        lse.copy_(lse_to)
