"""rope_append: its checks and launch; the arithmetic is in rope_kernel.py."""

import torch

from cpu_kernels.attention.op import check_pages, page_parameters
from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.formats.pages import hadamard_block
from cpu_kernels.team.team import Team


def row_scratch_bytes(head_dim: int) -> int:
    """Working memory of one thread: a float32 row, padded to whole groups."""
    return -(-head_dim // 64) * 256


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
    queries_per_kv = num_heads // groups
    expect(
        unit_features >= (queries_per_kv + 2) * head_dim,
        f"qkv has {unit_features} features per group; {queries_per_kv} query heads, k and v of {head_dim} need more",
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
    k, v = (page_parameters(pages, kv_dtype, head_dim) for pages in (k_pages, v_pages))
    row_bytes, block = row_scratch_bytes(head_dim), hadamard_block(kv_dtype, head_dim)
    failure = team.run(
        ("attention.rope_kernel", "rope_append", kv_dtype),
        team.num_threads * row_bytes,
        qkv.data_ptr(),
        4 * qkv.stride(0),
        4 * qkv.stride(1),
        rows,
        groups,
        queries_per_kv,
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
        *k,
        *v,
        num_pages * page_size,
        page_size,
        slots.data_ptr(),
        8 * slots.stride(0),
        row_bytes,
        block,
        bits_of(block**-0.5),
    )
    expect(failure != 1, f"positions must lie in 0..{max_positions - 1}, the rows of cos and sin")
    expect(failure != 2, f"slots must lie in 0..{num_pages * page_size - 1}, the slots of the pages")
