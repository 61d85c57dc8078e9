"""route, combine, scale_rows and norm_heads: checks and launches; route_kernel.py and combine_kernel.py compute."""

import torch
from torch import Tensor

from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import Routes, Scoring
from cpu_kernels.small.route_sizes import EXPERTS_AT_ONCE
from cpu_kernels.team.arguments import COMBINE, NORM_HEADS, ROUTE, SCALE_ROWS
from cpu_kernels.team.team import Team


def route(team: Team, x: Tensor, router: Tensor, scoring: Scoring, into: Routes) -> None:
    ids, places, sources, starts, weights, expert_slots = into
    expect(expert_slots is None, "expert_slots are in GPU memory, and the CPU reads every expert where it is")
    check_tensor("x", x, torch.float32, (None, None))
    check_tensor("ids", ids, torch.int32, (x.shape[0], None))
    check_tensor("starts", starts, torch.int32, (None,))
    (rows, hidden), top_k, experts = x.shape, ids.shape[1], starts.shape[0] - 1
    check_tensor("router", router, torch.float32, (None, hidden))
    check_tensor("places", places, torch.int32, (rows, top_k))
    check_tensor("sources", sources, torch.int32, (rows * top_k,))
    check_tensor("weights", weights, torch.float32, (rows, top_k + 1))
    expect(1 <= top_k <= experts, f"ids has {top_k} experts a row; there are {experts}, and a row takes at least one")
    expect(
        router.shape[0] % EXPERTS_AT_ONCE == 0 and router.shape[0] >= experts + scoring.gated,
        f"router has {router.shape[0]} rows; it must have those of {experts} experts"
        f"{' and the gate' if scoring.gated else ''}, then zeros to a multiple of {EXPERTS_AT_ONCE}",
    )
    for name, tensor in (("router", router), ("ids", ids), ("places", places)):
        expect(tensor.is_contiguous(), f"{name} must be contiguous")
    _check_scoring(scoring, experts, top_k)
    if rows:
        team.run(
            ("small.route_kernel", "route"),
            12 * rows * router.shape[0],
            *ROUTE.filled(
                x=x.data_ptr(),
                x_row=4 * x.stride(0),
                rows=rows,
                hidden=hidden,
                router=router.data_ptr(),
                experts=experts,
                router_rows=router.shape[0],
                top_k=top_k,
                normalise=int(scoring.normalised),
                gated=int(scoring.gated),
                ids=ids.data_ptr(),
                places=places.data_ptr(),
                sources=sources.data_ptr(),
                starts=starts.data_ptr(),
                weights=weights.data_ptr(),
                weights_row=4 * weights.stride(0),
                sigmoid=int(scoring.sigmoid),
                bias=0 if scoring.bias is None else scoring.bias.data_ptr(),
                correction=0 if scoring.correction is None else scoring.correction.data_ptr(),
                groups=scoring.groups,
                kept_groups=scoring.kept_groups,
                eps=bits_of(scoring.eps),
                scale=bits_of(scoring.scale),
            ),
        )


def _check_scoring(scoring: Scoring, experts: int, top_k: int) -> None:
    for name in ("bias", "correction"):
        if (values := getattr(scoring, name)) is not None:
            check_tensor(name, values, torch.float32, (experts,))
    groups, kept = scoring.groups, scoring.kept_groups
    expect(scoring.sigmoid or (scoring.correction is None and groups == 1), "correction and groups are of sigmoids")
    expect(
        1 <= kept <= groups and experts % groups == 0 and top_k <= kept * (experts // groups),
        f"{top_k} experts of {kept} of {groups} groups are wanted; there are {experts} experts",
    )


def combine(
    team: Team,
    near: Tensor,
    far: Tensor,
    border: Tensor,
    places: Tensor,
    weights: Tensor,
    out: Tensor,
) -> None:
    check_tensor("out", out, torch.float32, (None, None))
    rows, features = out.shape
    check_tensor("places", places, torch.int32, (rows, None))
    picks = places.shape[1]
    check_tensor("border", border, torch.int32, (1,))
    check_tensor("weights", weights, torch.float32, (rows, picks))
    for name, tensor in (("near", near), ("far", far)):
        check_tensor(name, tensor, torch.float32, (rows * picks, features))
    expect(places.is_contiguous(), "places must be contiguous")
    if rows and features:
        team.run(
            ("small.combine_kernel", "combine"),
            0,
            *COMBINE.filled(
                near=near.data_ptr(),
                near_row=4 * near.stride(0),
                far=far.data_ptr(),
                far_row=4 * far.stride(0),
                border=border.data_ptr(),
                places=places.data_ptr(),
                weights=weights.data_ptr(),
                weights_row=4 * weights.stride(0),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                picks=picks,
                features=features,
            ),
        )


def scale_rows(team: Team, factors: Tensor, out: Tensor) -> None:
    check_tensor("out", out, torch.float32, (None, None))
    rows, features = out.shape
    check_tensor("factors", factors, torch.float32, (rows, 1))
    if rows and features:
        team.run(
            ("small.combine_kernel", "scale_rows"),
            0,
            *SCALE_ROWS.filled(
                factors=factors.data_ptr(),
                factor_row=4 * factors.stride(0),
                out=out.data_ptr(),
                out_row=4 * out.stride(0),
                rows=rows,
                features=features,
            ),
        )


def norm_heads(team: Team, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
    check_tensor("qkv", qkv, torch.float32, (None, None, None))
    rows, kv_heads, unit = qkv.shape
    check_tensor("q_norm", q_norm, torch.float32, (None,))
    check_tensor("k_norm", k_norm, torch.float32, (None,))
    q_width, k_width = (norm.shape[0] // max(kv_heads, 1) for norm in (q_norm, k_norm))
    fits = (
        q_width * kv_heads == q_norm.shape[0]
        and k_width * kv_heads == k_norm.shape[0]
        and q_width + 2 * k_width <= unit
    )
    expect(fits, f"q_norm and k_norm have {q_norm.shape[0]} and {k_norm.shape[0]} features; qkv is {list(qkv.shape)}")
    if rows and kv_heads:
        team.run(
            ("small.combine_kernel", "norm_heads"),
            0,
            *NORM_HEADS.filled(
                qkv=qkv.data_ptr(),
                qkv_row=4 * qkv.stride(0),
                qkv_unit=4 * qkv.stride(1),
                rows=rows,
                kv_heads=kv_heads,
                q_width=q_width,
                k_width=k_width,
                q_norm=q_norm.data_ptr(),
                k_norm=k_norm.data_ptr(),
                eps=bits_of(eps),
            ),
        )
