"""Every op in plain torch: the oracle of both kernel packages, on any device, slow and obvious on purpose.

Outputs are written in place into the `out` arguments. Arithmetic is float32; when the activation input is float64 the
same code computes in float64, and is then the oracle that float32 results are compared with. The roundings that belong
to the contract (activations to int8 or bf16, q and the weights of attention to the KV dtype) happen in both cases, so
both see the same numbers.

    linear      y = round(x) @ unpack(W)^T + b            round: by weight dtype
    attention   s_j = scale * q . k_j over visible j, with a cap s_j = cap * tanh(s_j / cap) of it;
                lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j
                over bf16 pages round(2^(s_j / ln 2 - M)) v_j / sum_j 2^(s_j / ln 2 - M), M whole: weights rounded to
                bf16 are the same whatever M is, so every lane, tile and segment rounds them alike
    merge       m = max_i lse_i;  w_i = exp(lse_i - m);  out = sum w_i out_i / sum w_i;  lse = m + log sum w_i
    rms_norm    y = x / sqrt(mean(x^2) + eps) * weight, or y += that
    layer_norm  y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
    silu_mul    y = gate / (1 + exp(-gate)) * up
    gelu_mul    y = gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) / 2 * up
    clamped_silu_mul  y = (u + 1) g / (1 + exp(-alpha g)), g = min(gate, limit), u = up between -limit and limit
    gelu        y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    gather_columns  y_i = x_j, j = order_i
    route       ids = the k largest of x router^T, w = softmax(x router^T) there, or as `Scoring` says
                expert_linear  p = x W[id]^T;  add_expert_bias  p += b[id];  combine  y += sum_j w_j p_j
                scale_rows  y *= f
    sigmoid_mul  out *= 1 / (1 + exp(-gate))
    add_sinks   out *= 1 / (1 + exp(s - lse))
    norm_heads  q = q / sqrt(mean over all heads of q^2 + eps) * weight, k likewise
    delta_step  S = g S + k u^T, u = b (v - g S^T k);  y = S^T q / sqrt(key_dim), RMS-normalised, * silu(z)
    rope        (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + rotary_dim / 2);
                then, for pages of codes, q and k times the Walsh-Hadamard matrix of kv_pages.spread

A query that sees no key at all gets (out, lse) = (0, -inf), the identity of merge.
"""

from gpu_kernels.reference.attention import (
    add_sinks,
    decode_attention,
    merge,
    prefill_attention,
    rope_append,
)
from gpu_kernels.reference.delta import delta_step
from gpu_kernels.reference.elementwise import (
    add_rows,
    clamped_silu_mul,
    copy_rows,
    gather_columns,
    gelu,
    gelu_mul,
    layer_norm,
    norm_heads,
    rms_norm,
    rounded_gated,
    rounded_norm,
    sigmoid_mul,
    silu_mul,
)
from gpu_kernels.reference.experts import (
    add_expert_bias,
    choice_scores,
    combine,
    expert_linear,
    in_best_groups,
    route,
    route_to,
    scale_rows,
)
from gpu_kernels.reference.linear_layer import (
    linear,
    linear_unpacked,
    quantize_activation,
    round_activation,
    rounded,
)
from gpu_kernels.reference.packed import (
    BLOCK_FEATURES,
    GROUP,
    PLAIN_DTYPES,
    SUPERBLOCK_BYTES,
    block_bytes,
    check_weight_dtype,
    mix_of,
    mixed_parts,
    unpack,
    unpack_rows,
)

__all__ = [
    "BLOCK_FEATURES",
    "GROUP",
    "PLAIN_DTYPES",
    "SUPERBLOCK_BYTES",
    "add_expert_bias",
    "add_rows",
    "add_sinks",
    "block_bytes",
    "check_weight_dtype",
    "choice_scores",
    "clamped_silu_mul",
    "combine",
    "copy_rows",
    "decode_attention",
    "delta_step",
    "expert_linear",
    "gather_columns",
    "gelu",
    "gelu_mul",
    "in_best_groups",
    "layer_norm",
    "linear",
    "linear_unpacked",
    "merge",
    "mix_of",
    "mixed_parts",
    "norm_heads",
    "prefill_attention",
    "quantize_activation",
    "rms_norm",
    "rope_append",
    "round_activation",
    "rounded",
    "rounded_gated",
    "rounded_norm",
    "route",
    "route_to",
    "scale_rows",
    "sigmoid_mul",
    "silu_mul",
    "unpack",
    "unpack_rows",
]
