"""Rotary position embedding: cos and sin of every position, computed once for a given context.

The angle of position p in pair i is `p * inv_freq[i]`, and the rope types differ only in `inv_freq` and in one scale on
cos and sin. Frequencies and angles are float32 products, in the order transformers multiplies: at position 100 000 the
rounding of a float32 angle is 4e-3 radians, so a float64 table would be closer to the formula and farther from the
numbers that the models were trained and published with.

The frequencies of `dynamic` and `longrope` depend on how long the sequence is; see `rope_tables`.

Formulas: RoFormer (arXiv 2104.09864); linear and dynamic NTK scaling; YaRN (2309.00071) section 3; LongRoPE
(2402.13753); the piecewise interpolation of Llama 3.1.
"""

import math

import torch

from hetero_attn.spec.config import ModelConfig, RopeConfig


def rope_tables(
    config: ModelConfig, max_positions: int, seq_len: int | None = None, rope: RopeConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions 0 .. max_positions-1, attention scaling of yarn folded in.

    Args:
        config: the model. max_positions: rows of the tables, tokens. rope: of some layers, None is the model's own.
        seq_len: only for rope types `dynamic` and `longrope`: the sequence length, in tokens, that the frequencies
            are stretched for.
            transformers stretches anew whenever a sequence grows beyond `max_position_embeddings`, which leaves keys
            cached under older frequencies; here one set serves the whole run. None means `max_positions`, the longest
            sequence that the tables allow. Up to `max_position_embeddings` nothing is stretched, as in transformers.

    Returns:
        (cos, sin), float32 [max_positions, rotary_dim / 2] on the CPU, for the rotate-half convention: dimension i
        pairs with dimension i + rotary_dim / 2.
    """
    rope = rope or config.rope
    frequencies = _inverse_frequencies(
        rope, config.max_position_embeddings, max_positions if seq_len is None else seq_len
    )
    angles = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    scale = _attention_factor(rope) if rope.rope_type in ("yarn", "longrope") else 1.0
    return angles.cos() * scale, angles.sin() * scale


def _inverse_frequencies(rope: RopeConfig, trained: int, seq_len: int) -> torch.Tensor:
    """float32 [rotary_dim / 2], radians per position."""
    dim = rope.rotary_dim
    if rope.rope_type == "linear":
        return _plain(rope.theta, dim) / rope.factor
    if rope.rope_type == "dynamic":
        return _dynamic(rope, dim, trained, seq_len)
    if rope.rope_type == "llama3":
        return _llama3(rope, dim)
    if rope.rope_type == "yarn":
        return _yarn(rope, dim)
    if rope.rope_type == "none":
        return torch.zeros(dim // 2, dtype=torch.float32, device="cpu")
    if rope.rope_type == "longrope":
        return _longrope(rope, dim, seq_len)
    if rope.rope_type == "divisors":
        return _plain(rope.theta, dim) / torch.tensor(rope.divisors, dtype=torch.float32, device="cpu")
    return _plain(rope.theta, dim)


def _plain(theta: float | torch.Tensor, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _dynamic(rope: RopeConfig, dim: int, trained: int, seq_len: int) -> torch.Tensor:
    # A tensor, because transformers stretches at run time in float32.
    length = torch.tensor(seq_len, dtype=torch.float32, device="cpu") if seq_len > trained else trained
    stretch = rope.factor * length / trained - (rope.factor - 1)
    return _plain(rope.theta * stretch ** (dim / (dim - 2)), dim)


def _llama3(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, and those between are interpolated."""
    plain = _plain(rope.theta, dim)
    wavelength = 2 * math.pi / plain
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelength > original / low, plain / rope.factor, between)
    return torch.where(wavelength < original / high, plain, stretched)


def _longrope(rope: RopeConfig, dim: int, seq_len: int) -> torch.Tensor:
    """One divisor for each pair, of two sets; transformers chooses anew for every call, here one holds for a run."""
    chosen = rope.long_divisors if seq_len > rope.original_max_position_embeddings else rope.divisors
    steps = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    return 1.0 / (torch.tensor(chosen, dtype=torch.float32, device="cpu") * steps)


def _yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Frequencies that turn often in the trained context are kept, slow ones divided by `factor`, a ramp between."""
    steps = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    low = _yarn_pair(rope, dim, rope.beta_fast)
    high = _yarn_pair(rope, dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    keep = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width, 0, 1)
    return 1.0 / (rope.factor * steps) * (1 - keep) + 1.0 / steps * keep


def _yarn_pair(rope: RopeConfig, dim: int, turns: float) -> float:
    """The (fractional) pair index whose frequency makes `turns` rotations within the trained context."""
    return dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _attention_factor(rope: RopeConfig) -> float:
    """The temperature of yarn, applied to cos and sin so that q . k carries its square."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
