"""Every op in plain torch: the oracle of both kernel packages, on any device, slow and obvious on purpose.

Outputs are written in place into the `out` arguments. Arithmetic is float32; when the activation input is float64 the
same code computes in float64, and is then the oracle that float32 results are compared with. The roundings that belong
to the contract (activations to int8 or bf16, q and the weights of attention to the KV dtype) happen in both cases, so
both see the same numbers.

    linear      y = round(x) @ unpack(W)^T + b            round: by weight dtype
    attention   s_j = scale * q . k_j over visible j;  lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j
                over bf16 pages round(2^(s_j / ln 2 - M)) v_j / sum_j 2^(s_j / ln 2 - M), M whole: weights rounded to
                bf16 are the same whatever M is, so every lane, tile and segment rounds them alike
    merge       m = max_i lse_i;  w_i = exp(lse_i - m);  out = sum w_i out_i / sum w_i;  lse = m + log sum w_i
    rms_norm    y = x / sqrt(mean(x^2) + eps) * weight, or y += that
    layer_norm  y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
    silu_mul    y = gate / (1 + exp(-gate)) * up
    gelu_mul    y = gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) / 2 * up
    gelu        y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    route       ids = the k largest of x router^T, w = softmax(x router^T) there;  expert_linear  p = x W[id]^T;
                combine  y += sum_j w_j p_j;  scale_rows  y *= f
    norm_heads  q = q / sqrt(mean over all heads of q^2 + eps) * weight, k likewise
    rope        (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + rotary_dim / 2);
                then, for pages of codes, q and k times the Walsh-Hadamard matrix of kv_pages.spread

A query that sees no key at all gets (out, lse) = (0, -inf), the identity of merge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_kernels import kv_pages
from gpu_kernels.experts import ordered
from gpu_kernels.forms.unpack import FORMS, superblock_bytes, unpack_form

PLAIN_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_FEATURES = 16
GROUP = 64
SUPERBLOCK_BYTES = {"q8": 1088, "q4": 576}  # of 64 inputs; those of the other coded formats follow from their form
LINE_BYTES = 64


def copy_rows(target: Tensor, source: Tensor) -> None:
    """target = source, both f32 [rows, columns]."""
    target.copy_(source)


def add_rows(target: Tensor, source: Tensor) -> None:
    """target += source, both f32 [rows, columns]."""
    target += source


def rounded(x: Tensor, weight_dtype: str) -> Tensor:
    """What `linear` takes for x where it multiplies several pieces of a weight: here x itself, rounded every time."""
    return x


def rounded_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, weight_dtype: str) -> Tensor:
    """`rms_norm` into `out`, and what `rounded` makes of it."""
    rms_norm(x, weight, eps, out)
    return rounded(out, weight_dtype)


def rounded_gated(gate_up: Tensor, out: Tensor, activation: str, weight_dtype: str) -> Tensor:
    """`silu_mul` or `gelu_mul`, as `activation` says, into `out`, and what `rounded` makes of it."""
    (silu_mul if activation == "silu_mul" else gelu_mul)(gate_up, out)
    return rounded(out, weight_dtype)


def linear(
    x: Tensor, weight: Tensor, weight_dtype: str, bias: Tensor | None, out: Tensor, accumulate: bool = False
) -> None:
    """Write (or with `accumulate` add) the linear layer of `x` into `out`.

    x: f32 [rows, in_features]. weight: uint8 [num_blocks, block_bytes], packed. weight_dtype: one of the known ones, or
    a mix as in cpu_kernels/formats, whose weight is [units, unit_bytes]. bias: f32 [features] or None. out: f32 [rows,
    features]. Raises ValueError for an unknown weight dtype.
    """
    for name, blocks, columns in mixed_parts(weight, weight_dtype, x.shape[-1]):
        dense = unpack(blocks, name, x.shape[-1], _compute_dtype(x))
        part = None if bias is None else bias[columns]
        result = torch.empty(x.shape[0], dense.shape[0], dtype=out.dtype, device=out.device)
        linear_unpacked(round_activation(x, name), dense, part, result)
        if accumulate:
            out[:, columns] += result
        else:
            out[:, columns] = result


def mixed_parts(weight: Tensor, weight_dtype: str, in_features: int) -> list[tuple[str, Tensor, Tensor | slice]]:
    """(format, blocks [count, block_bytes], output features) of every format of a mix; all of them of a plain
    format."""
    if "*" not in weight_dtype:
        return [(weight_dtype, weight, slice(None))]
    parts = mix_of(weight_dtype)
    found, at, first = [], 0, 0
    unit_blocks = sum(count for _, count in parts)
    features = torch.arange(weight.shape[0] * unit_blocks * BLOCK_FEATURES, device=weight.device)
    features = features.view(weight.shape[0], unit_blocks, BLOCK_FEATURES)
    for name, count in parts:
        size = count * block_bytes(name, in_features)
        blocks = weight[:, at : at + size].contiguous().view(weight.shape[0] * count, -1)
        found.append((name, blocks, features[:, first : first + count].flatten()))
        at, first = at + size, first + count
    return found


def mix_of(weight_dtype: str) -> list[tuple[str, int]]:
    """(format, blocks in a unit) of every part of a mix; a plain format is one of one."""
    return [(name, int(count or 1)) for name, _, count in (part.partition("*") for part in weight_dtype.split("+"))]


def block_bytes(weight_dtype: str, in_features: int) -> int:
    """Bytes of 16 output features."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in PLAIN_DTYPES:
        return BLOCK_FEATURES * in_features * PLAIN_DTYPES[weight_dtype].itemsize
    if weight_dtype in FORMS:
        form = FORMS[weight_dtype]
        return -(-in_features // form.inputs) * superblock_bytes(form)
    return -(-in_features // GROUP) * SUPERBLOCK_BYTES[weight_dtype]


def linear_unpacked(x: Tensor, dense: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool = False) -> None:
    """The second half of `linear`, for a caller that keeps unpacked weights.

    x: [rows, in_features] from `round_activation`. dense: [out_features, in_features] from `unpack`, in x's dtype.
    """
    result = x @ dense.T
    if bias is not None:
        result = result + bias
    if accumulate:
        out += result
    else:
        out.copy_(result)


def round_activation(x: Tensor, weight_dtype: str) -> Tensor:
    """The input of a linear layer as the arithmetic of `weight_dtype` sees it, in the dtype and shape of `x`."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in ("fp32", "fp16"):
        return x
    if weight_dtype == "bf16":
        return x.float().to(torch.bfloat16).to(x.dtype)
    q, scale = quantize_activation(x)
    return (q.to(x.dtype) * scale.to(x.dtype)[..., None]).flatten(1)[:, : x.shape[-1]]


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row per group of 64 inputs: (int8 [rows, groups, 64], float32 scale [rows, groups]).

    x: [rows, in_features], padded with zeros to whole groups. scale = absmax / 127, q = round_half_even(x / scale).
    """
    groups = -(-x.shape[-1] // GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, groups * GROUP - x.shape[-1]))
    grouped = padded.view(x.shape[0], groups, GROUP)
    scale = grouped.abs().amax(-1) / 127.0
    q = torch.round(grouped / torch.where(scale == 0, 1.0, scale)[..., None])
    return q.clamp(-127, 127).to(torch.int8), scale


def unpack(weight: Tensor, weight_dtype: str, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise packed blocks to a dense `dtype` [num_blocks*16, in_features].

    weight: uint8 [num_blocks, block_bytes], contiguous. Raises ValueError for an unknown weight dtype.
    """
    check_weight_dtype(weight_dtype)
    if weight_dtype in PLAIN_DTYPES:
        return weight.view(PLAIN_DTYPES[weight_dtype]).reshape(-1, in_features).to(dtype)
    if weight_dtype in FORMS:
        return unpack_form(weight, weight_dtype, in_features, dtype)
    superblocks = -(-in_features // GROUP)
    lines = weight.view(weight.shape[0], superblocks, -1, LINE_BYTES)
    values = (_unpack_q4 if weight_dtype == "q4" else _unpack_q8)(lines, dtype)
    return values.reshape(weight.shape[0] * BLOCK_FEATURES, superblocks * GROUP)[:, :in_features]


def _unpack_q4(lines: Tensor, dtype: torch.dtype) -> Tensor:
    num_blocks, superblocks = lines.shape[:2]
    header = lines[:, :, 0].contiguous().view(torch.float16).to(dtype)
    scale, minimum = (part.transpose(1, 2)[..., None] for part in header.split(BLOCK_FEATURES, dim=-1))
    pairs = lines[:, :, 1:].reshape(num_blocks, superblocks, 8, BLOCK_FEATURES, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-2)  # (num_blocks, superblocks, 8 lines, 16 features, 2, 4)
    nibbles = nibbles.permute(0, 3, 1, 2, 4, 5).reshape(num_blocks, BLOCK_FEATURES, superblocks, GROUP)
    return nibbles.to(dtype) * scale + minimum


def _unpack_q8(lines: Tensor, dtype: torch.dtype) -> Tensor:
    num_blocks, superblocks = lines.shape[:2]
    header = lines[:, :, 0].contiguous().view(torch.float16).to(dtype)
    scale = header.view(num_blocks, superblocks, 2, BLOCK_FEATURES).permute(0, 3, 1, 2)[..., None]
    stored = lines[:, :, 1:].reshape(num_blocks, superblocks, 2, 8, BLOCK_FEATURES, 4)
    stored = stored.permute(0, 4, 1, 2, 3, 5).reshape(num_blocks, BLOCK_FEATURES, superblocks, 2, GROUP // 2)
    return (stored.to(dtype) - 128) * scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, accumulate: bool = False) -> None:
    """Root-mean-square norm of each row of `x` into `out`, or added to it, both f32 [rows, hidden]; weight f32
    [hidden]."""
    result = _rms_normalized(x, weight, eps)
    out.copy_(out + result if accumulate else result)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    """Norm of each row of `x` around its mean into `out`, f32 [rows, hidden]; weight, bias: f32 [hidden], or None."""
    apart = x - x.mean(-1, keepdim=True)
    normed = _rms_normalized(apart, weight, eps)
    out.copy_(normed if bias is None else normed + bias)


def gelu(x: Tensor, out: Tensor) -> None:
    """gelu(x) in its form by tanh into `out`, both f32 [rows, features]."""
    out.copy_(torch.nn.functional.gelu(x, approximate="tanh"))


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """silu(gate) * up into `out`, f32 [rows, units*16]; gate_up: f32 [rows, units*32], a unit being 16 gate | 16 up.

    The exponential of float32 is that of every lane, bit by bit.
    """
    gate, up = _gate_and_up(gate_up)
    power = ordered.exp(-gate) if gate.dtype == torch.float32 else torch.exp(-gate)
    out.copy_((gate / (1.0 + power) * up).flatten(1))


def gelu_mul(gate_up: Tensor, out: Tensor) -> None:
    """gelu(gate) * up, gelu in its form by tanh; shapes as in silu_mul."""
    gate, up = _gate_and_up(gate_up)
    out.copy_((torch.nn.functional.gelu(gate, approximate="tanh") * up).flatten(1))


def _gate_and_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.unflatten(-1, (gate_up.shape[-1] // 32, 2, BLOCK_FEATURES)).unbind(-2)


def route(
    x: Tensor,
    router: Tensor,
    gated: bool,
    normalise: bool,
    ids: Tensor,
    places: Tensor,
    sources: Tensor,
    starts: Tensor,
    weights: Tensor,
) -> None:
    """Choose the experts of every row by x router^T, and sort all choices by expert.

    x: f32 [rows, hidden]. router: f32 [experts, hidden], one more row where it is gated, zeros behind. Written: ids
    int32 [rows, k], the highest scores of a row, of equal ones the lower id, ascending; weights f32 [rows, k + 1], the
    softmax over all experts at these, divided by their sum if `normalise`, then sigmoid of the gate's product, 1
    without one; starts int32 [experts + 1], where each expert's picks begin; places int32 [rows, k], where each pick is
    among all, sorted by expert, then by row; sources int32 [rows * k], the row of the pick at each place.
    """
    experts, top_k = starts.shape[0] - 1, ids.shape[1]
    logits = x @ router.T.to(x.dtype)
    best = torch.sort(logits[:, :experts], dim=-1, descending=True, stable=True).indices[:, :top_k].sort(-1).values
    route_to(best, x, router, gated, normalise, ids, places, sources, starts, weights)


def route_to(
    best: Tensor,
    x: Tensor,
    router: Tensor,
    gated: bool,
    normalise: bool,
    ids: Tensor,
    places: Tensor,
    sources: Tensor,
    starts: Tensor,
    weights: Tensor,
) -> None:
    """What `route` writes where the experts of every row are `best`, int64 [rows, k], ascending, whatever the scores
    are."""
    experts, top_k = starts.shape[0] - 1, ids.shape[1]
    logits = x @ router.T.to(x.dtype)
    scores = torch.softmax(logits[:, :experts], dim=-1)
    chosen = scores.gather(1, best)
    weights[:, :top_k] = chosen / chosen.sum(-1, keepdim=True) if normalise else chosen
    weights[:, top_k] = torch.sigmoid(logits[:, experts]) if gated else 1.0
    ids.copy_(best)
    order = torch.sort(best.flatten(), stable=True).indices
    sources.copy_(order // top_k)
    places.view(-1)[order] = torch.arange(order.shape[0], dtype=places.dtype, device=places.device)
    starts[0] = 0
    everyone = torch.arange(experts, device=best.device)
    starts[1:] = (best.flatten()[:, None] == everyone).sum(0).cumsum(0)


def expert_linear(
    x: Tensor, sources: Tensor | None, starts: Tensor, first: int, weight: Tensor, weight_dtype: str, out: Tensor
) -> None:
    """x W^T for every pick of some experts, each with its expert's W, into the picks' rows of `out`.

    x: f32 [rows, in_features]. sources: int32 [picks], the row of x of each pick, None where it is the pick's own.
    starts: int32 [all experts + 1], from `route`. first: the expert of weight[0]. weight: uint8 [experts, blocks,
    block_bytes], or of a mix [experts, units, unit_bytes]. out: f32 [picks, features]; picks of others stay.
    Whole-number formats give the same bits on every lane, see `experts.ordered`.
    """
    bounds = starts[first : first + weight.shape[0] + 1].tolist()
    for expert, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start < stop:
            rows = x[start:stop] if sources is None else x[sources[start:stop].long()]
            _linear_of_expert(rows, weight[expert], weight_dtype, out[start:stop])


def _linear_of_expert(x: Tensor, weight: Tensor, weight_dtype: str, out: Tensor) -> None:
    for name, blocks, columns in mixed_parts(weight, weight_dtype, x.shape[-1]):
        if name in ordered.WHOLE_FORMS and x.dtype == torch.float32:
            out[:, columns] = ordered.whole_linear(*quantize_activation(x), blocks, name)
        else:
            part = torch.empty(x.shape[0], blocks.shape[0] * BLOCK_FEATURES, dtype=out.dtype, device=out.device)
            linear(x, blocks, name, None, part)
            out[:, columns] = part


def combine(near: Tensor, far: Tensor, border: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
    """Add to every row of `out` the weighted outputs of its picks, one after the other.

    near, far: f32 [rows * k, features], outputs by place: those before border, int32 [1], from near, others from far.
    places: int32 [rows, k]. weights: f32 [rows, k]. out: f32 [rows, features].
    """
    for pick, place in enumerate(places.long().unbind(1)):
        output = torch.where((place < border)[:, None], near[place], far[place])
        out += weights[:, pick, None] * output


def scale_rows(factors: Tensor, out: Tensor) -> None:
    """out[r] *= factors[r]; factors: f32 [rows, 1], out: f32 [rows, features]."""
    out *= factors


def norm_heads(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
    """RMS norm of q over all its heads together, and of k, in place.

    qkv: f32 [rows, num_kv_heads, unit_features], a unit being its q heads, k, v and padding. q_norm: f32 [num_heads *
    head_dim]. k_norm: f32 [num_kv_heads * head_dim].
    """
    groups, q_width, k_width = qkv.shape[1], q_norm.shape[0] // qkv.shape[1], k_norm.shape[0] // qkv.shape[1]
    parts = (qkv[:, :, :q_width], q_norm), (qkv[:, :, q_width : q_width + k_width], k_norm)
    for part, weight in parts:
        inverse = torch.rsqrt(part.square().mean((1, 2), keepdim=True) + eps)
        part.copy_(part * inverse * weight.view(groups, -1))


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> None:
    """Norm (optional) and rotate q and k; write q to `q`, and k and v to their slots of the pages.

    For pages of codes q and k are then spread by one Walsh-Hadamard matrix, see kv_pages; such a q is for attention
    over such pages alone.

    qkv: f32 [rows, num_kv_heads, unit_features], a unit being its q heads, k, v and padding. positions: int64 [rows].
    cos, sin: f32 [max_positions, rotary_dim/2]. q_norm, k_norm: f32 [head_dim] or None. q: f32 [rows, num_heads,
    head_dim]. k_pages, v_pages: [num_pages, page_size, row_items], see kv_pages. slots: int64 [rows, num_kv_heads],
    page * page_size + offset; no two may be equal.
    """
    head_dim, num_kv_heads = q.shape[2], qkv.shape[1]
    queries_per_kv = q.shape[1] // num_kv_heads
    heads = qkv[..., : (queries_per_kv + 2) * head_dim].unflatten(-1, (queries_per_kv + 2, head_dim))
    query, key, value = heads[:, :, :queries_per_kv], heads[:, :, queries_per_kv], heads[:, :, queries_per_kv + 1]
    if q_norm is not None:
        query = _rms_normalized(query, q_norm, eps)
    if k_norm is not None:
        key = _rms_normalized(key, k_norm, eps)
    query, key = (
        kv_pages.spread(_rotated(part, cos[positions], sin[positions]), k_pages.dtype)
        for part in (query.flatten(1, 2), key)
    )
    q.copy_(query)
    page, offset = slots // k_pages.shape[1], slots % k_pages.shape[1]
    kv_pages.write_rows(k_pages, page, offset, key)
    kv_pages.write_rows(v_pages, page, offset, value)


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_start: Tensor,
    kv_stop: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of one query per sequence over the positions [kv_start, kv_stop) of its cache.

    q, out: f32 [batch, num_heads, head_dim]. k_pages, v_pages: [num_pages, page_size, row_items], see kv_pages; q is
    rounded to their dtype, bf16 for codes. page_table: int32 [batch, num_kv_heads, max_pages], page id of logical page
    position // page_size; entries outside the range are
    never read. kv_start, kv_stop: int32 [batch]. lse: f32 [batch, num_heads].
    """
    pages = _needed_pages(kv_start, kv_stop, k_pages.shape[1])
    positions = _positions(pages, k_pages)
    visible = (positions >= kv_start[:, None]) & (positions < kv_stop[:, None])  # (batch, kv_len)
    keys, values = _gather(k_pages, v_pages, page_table, pages, visible[:, None], q)
    query = _grouped(q, k_pages, page_table.shape[1])[
        :, :, :, None
    ]  # (batch, num_kv_heads, queries_per_kv, 1, head_dim)
    rounded = k_pages.dtype == torch.bfloat16
    partial, partial_lse = _attend(
        query, keys[:, :, None], values[:, :, None], visible[:, None, None, None], scale, rounded
    )
    out.copy_(partial.reshape(out.shape))
    lse.copy_(partial_lse.reshape(lse.shape))


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_start: int,
    kv_stop: int,
    q_start: int,
    window: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Causal attention of a chunk of one sequence; row i of `q` is position q_start + i.

    q, out: f32 [q_len, num_heads, head_dim]. page_table: int32 [num_kv_heads, max_pages]. lse: f32 [q_len, num_heads].
    Key j is visible to row i iff kv_start <= j < kv_stop and j <= q_start + i and (window == 0 or j > q_start + i -
    window).
    """
    limits = torch.tensor([kv_start], device="cpu"), torch.tensor([kv_stop], device="cpu")
    pages = _needed_pages(*limits, k_pages.shape[1])
    positions = _positions(pages, k_pages)
    rows = q_start + torch.arange(q.shape[0], device=q.device)[:, None]
    stored = (positions >= kv_start) & (positions < kv_stop)
    visible = stored & (positions <= rows)  # (q_len, kv_len)
    if window:
        visible = visible & (positions > rows - window)
    keys, values = _gather(k_pages, v_pages, page_table, pages, stored, q)
    query = _grouped(q, k_pages, page_table.shape[0]).permute(
        1, 2, 0, 3
    )  # (num_kv_heads, queries_per_kv, q_len, head_dim)
    rounded = k_pages.dtype == torch.bfloat16
    partial, partial_lse = _attend(query, keys[:, None], values[:, None], visible, scale, rounded)
    out.copy_(partial.permute(2, 0, 1, 3).reshape(out.shape))
    lse.copy_(partial_lse.permute(2, 0, 1).reshape(lse.shape))


def merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Merge any number (at least one) of attention partials over disjoint keys into `out` and `lse`.

    outs: f32 [..., head_dim] each; lses: f32 [...] each, natural log. `out` and `lse` may be one of the partials.
    """
    partials, weights = torch.stack(outs), torch.stack(lses)
    maximum = weights.amax(0)
    safe_maximum = torch.where(maximum == -torch.inf, 0.0, maximum)  # -inf - -inf would be NaN
    weights = torch.exp(weights - safe_maximum)
    total = weights.sum(0)
    mean = (weights[..., None] * partials).sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    out.copy_(mean)
    lse.copy_(safe_maximum + torch.log(total))


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    scores = ((query @ keys.transpose(-1, -2)) * scale).masked_fill(~visible, -torch.inf)
    powers = scores * math.log2(math.e)
    maximum = powers.amax(-1, keepdim=True).ceil() if powers.shape[-1] else powers.new_zeros(powers.shape[:-1] + (1,))
    weights = torch.exp2(powers - torch.where(maximum == -torch.inf, 0.0, maximum))
    total = weights.sum(-1, keepdim=True)
    if rounded:
        weights = weights.to(torch.bfloat16).to(values.dtype)
    return weights @ values / torch.where(total == 0, 1.0, total), torch.logsumexp(scores, dim=-1)


def _needed_pages(kv_start: Tensor, kv_stop: Tensor, page_size: int) -> slice:
    """The logical pages that hold any position of any non-empty range."""
    filled = kv_stop > kv_start
    if not bool(filled.any()):
        return slice(0, 0)
    return slice(int(kv_start[filled].min()) // page_size, -(-int(kv_stop[filled].max()) // page_size))


def _positions(pages: slice, k_pages: Tensor) -> Tensor:
    page_size = k_pages.shape[1]
    return torch.arange(pages.start * page_size, pages.stop * page_size, device=k_pages.device)


def _gather(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, pages: slice, stored: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., num_kv_heads, kv_len, head_dim] of a slice of logical pages; zero where not `stored`."""
    table = page_table[..., pages].long()
    wanted = stored.unflatten(-1, (table.shape[-1], k_pages.shape[1]))  # (..., pages, page_size)
    table = torch.where(wanted.any(-1), table, 0)  # entries of pages outside the range may hold anything
    rows = (kv_pages.read_rows(cache[table], q.shape[-1], _compute_dtype(q)) for cache in (k_pages, v_pages))
    return tuple(torch.where(wanted[..., None], row, 0).flatten(-3, -2) for row in rows)


def _grouped(q: Tensor, k_pages: Tensor, num_kv_heads: int) -> Tensor:
    """q rounded to the KV dtype, [rows, num_kv_heads, queries_per_kv, head_dim]."""
    return (
        q.to(kv_pages.query_dtype(k_pages.dtype))
        .to(_compute_dtype(q))
        .unflatten(1, (num_kv_heads, q.shape[1] // num_kv_heads))
    )


def _rms_normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [rows, heads, head_dim]; dimensions beyond the rotary ones pass through."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_weight_dtype(weight_dtype: str) -> None:
    """Raise ValueError, which names those there are, unless this is a format of weights."""
    known = ("fp32", "bf16", *SUPERBLOCK_BYTES, "fp16", *FORMS)
    if weight_dtype not in known:
        raise ValueError(f"weight dtype {weight_dtype!r} is unknown; known: {', '.join(known)}")
