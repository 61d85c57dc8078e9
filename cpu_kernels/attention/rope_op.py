"""rope_append: its checks and launch; the arithmetic is in rope_kernel.py."""

import torch
from torch import Tensor

from cpu_kernels.attention.op import check_pages, page_words
from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import Pages, Rotation
from cpu_kernels.formats.pages import hadamard_block
from cpu_kernels.team.arguments import ROPE
from cpu_kernels.team.team import Team


def row_scratch_bytes(head_dim: int) -> int:
    """Working memory of one thread: a float32 row, padded to whole groups."""
    return -(-head_dim // 64) * 256


def rope_append(
    team: Team, qkv: Tensor, positions: Tensor, rotation: Rotation, q: Tensor, pages: Pages, slots: Tensor
) -> None:
    queries_per_kv, head_dim = _check_heads(qkv, q)
    rows, kv_heads, _ = qkv.shape
    kv_dtype = check_pages(pages, head_dim)
    check_tensor("positions", positions, torch.int64, (rows,))
    _check_rotation(rotation, head_dim)
    cos, sin, q_norm, k_norm, eps = rotation
    max_positions, half = cos.shape
    check_tensor("slots", slots, torch.int64, (rows, kv_heads))
    if rows == 0:
        return
    num_slots = pages.k.shape[0] * pages.k.shape[1]
    row_bytes, block = row_scratch_bytes(head_dim), hadamard_block(kv_dtype, head_dim)
    failure = team.run(
        ("attention.rope_kernel", "rope_append", kv_dtype),
        team.num_threads * row_bytes,
        *ROPE.filled(
            qkv=qkv.data_ptr(),
            qkv_row=4 * qkv.stride(0),
            qkv_unit=4 * qkv.stride(1),
            rows=rows,
            kv_heads=kv_heads,
            queries_per_kv=queries_per_kv,
            head_dim=head_dim,
            half=half,
            positions=positions.data_ptr(),
            max_positions=max_positions,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            angle_row=4 * cos.stride(0),
            q_norm=0 if q_norm is None else q_norm.data_ptr(),
            k_norm=0 if k_norm is None else k_norm.data_ptr(),
            eps=bits_of(eps),
            q=q.data_ptr(),
            q_row=4 * q.stride(0),
            q_head=4 * q.stride(1),
            **page_words(pages, kv_dtype, head_dim),
            num_slots=num_slots,
            slots=slots.data_ptr(),
            slots_row=8 * slots.stride(0),
            row_bytes=row_bytes,
            block=block,
            factor=bits_of(block**-0.5),
        ),
    )
    expect(failure != 1, f"positions must lie in 0..{max_positions - 1}, the rows of cos and sin")
    expect(failure != 2, f"slots must lie in 0..{num_slots - 1}, the slots of the pages")


def _check_heads(qkv: Tensor, q: Tensor) -> tuple[int, int]:
    """(query heads of a KV head, head_dim)."""
    check_tensor("qkv", qkv, torch.float32, (None, None, None))
    rows, kv_heads, unit_features = qkv.shape
    check_tensor("q", q, torch.float32, (rows, None, None))
    _, num_heads, head_dim = q.shape
    expect(
        kv_heads > 0 and num_heads % kv_heads == 0, f"{num_heads} query heads do not divide over {kv_heads} KV heads"
    )
    queries_per_kv = num_heads // kv_heads
    expect(
        unit_features >= (queries_per_kv + 2) * head_dim,
        f"qkv has {unit_features} features per KV head; {queries_per_kv} query heads, k and v of {head_dim} need more",
    )
    return queries_per_kv, head_dim


def _check_rotation(rotation: Rotation, head_dim: int) -> None:
    cos, sin, q_norm, k_norm, _ = rotation
    check_tensor("cos", cos, torch.float32, (None, None))
    check_tensor("sin", sin, torch.float32, tuple(cos.shape))
    half = cos.shape[1]
    expect(2 * half <= head_dim, f"cos has {half} columns; rotary_dim {2 * half} is more than head_dim {head_dim}")
    expect(cos.stride(0) == sin.stride(0), "cos and sin must have the same row stride")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, torch.float32, (head_dim,))
