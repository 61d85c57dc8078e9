"""Random GGUF files with the layers of published mixtures of experts, fewer of them: what a speed needs, no language.

    python examples/benchmarks/models/random_experts.py SHAPE TYPE TARGET [--layers N] [--seed N]

s1  Qwen3-30B-A3B: 128 experts of 2048 x 768, 8 a token             4 layers: 2.6e9 weights
s2  Qwen3.6-35B-A3B: 256 of 2048 x 512, 8 a token and a shared one; three of four layers gated DeltaNet     3.5e9
s3  gpt-oss: 32 of 2880 x 2880, 4 a token, biases, sinks, every second layer a window                      3.3e9

Experts, attention and head are random codes of TYPE (of s3 attention and head Q8_0, as published); routers are drawn so
that scores spread. Writes tensor by tensor: a file of 3 GB takes seconds and a hundred MB of memory.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

VOCABULARY, CONTEXT = 25_600, 4096
# Bytes of a block, its weights, and which scales at its front make them about 0.02: float16, or an exponent byte.
# Q4_K: what multiplies scales of 0 to 63, and minima of 0 to 63, which 0 to 15 times the former have their middle at.
BLOCKS = {
    "Q4_0": (18, 32, [0.0045]),
    "Q4_K": (144, 256, [0.00015, 0.0011]),
    "Q8_0": (34, 32, [0.0003]),
    "MXFP4": (17, 32, 120),
}
TYPES = (*BLOCKS, "BF16")
Dims = tuple[int, ...]


def codes(generator: np.random.Generator, dims: Dims, kind: str) -> np.ndarray:
    """Random weights [.., inputs] of a type, uint8 [.., bytes of a row]."""
    if kind == "BF16":
        bits = generator.integers(0, 1 << 16, dims, dtype=np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(np.uint8)  # of 0.008 to 0.016 with either sign
    block_bytes, weights, scales = BLOCKS[kind]
    blocks = generator.integers(0, 256, (*dims[:-1], dims[-1] // weights, block_bytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = scales
    else:
        blocks[..., : 2 * len(scales)] = np.array(scales, dtype=np.float16).view(np.uint8)
    if kind == "Q4_0":  # without code 0, whose weight has no opposite: a mean makes all tokens choose the same experts
        two = blocks[..., 2:]
        two += 8 * (two & 15 == 0).astype(np.uint8)
        two += 128 * (two >> 4 == 0).astype(np.uint8)
    return blocks.reshape(*dims[:-1], -1)


class Writer:
    """A GGUF file of one shape: tensors are declared by their dims and made when they are written."""

    def __init__(self, target: Path, architecture: str, kind: str, layers: int, seed: int) -> None:
        self.kind, self.layers = kind, layers
        self.file = gguf.GGUFWriter(target, architecture)
        self._architecture, self._generator = architecture, np.random.default_rng(seed)
        self._tensors: list[Callable[[], np.ndarray]] = []

    def say(self, **values: int | float | bool) -> None:
        """Metadata of the architecture, underscores of `_dot_` being dots."""
        adds = {int: self.file.add_uint32, float: self.file.add_float32, bool: self.file.add_bool}
        for key, value in values.items():
            adds[type(value)](f"{self._architecture}.{key.replace('_dot_', '.')}", value)

    def weights(self, name: str, *dims: int, kind: str | None = None) -> None:
        """A matrix, or one of every expert, of random codes; dims as torch has them."""
        kind = kind or self.kind
        quantised = gguf.GGMLQuantizationType[kind]
        row = dims[-1] * 2 if kind == "BF16" else dims[-1] // BLOCKS[kind][1] * BLOCKS[kind][0]
        size = int(np.prod(dims[:-1])) * row
        self.file.add_tensor_info(f"{name}.weight", (*dims[:-1], row), np.dtype(np.uint8), size, quantised)
        self._tensors.append(lambda: codes(self._generator, dims, kind))

    def numbers(self, name: str, *dims: int, deviation: float = 0.0, mean: float = 0.0) -> None:
        """float32 numbers."""
        self.file.add_tensor_info(name, dims, np.dtype(np.float32), 4 * int(np.prod(dims)))
        self._tensors.append(
            lambda: (mean + deviation * self._generator.standard_normal(dims, dtype=np.float32)).astype(np.float32)
        )

    def finish(self) -> None:
        """Write everything."""
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_ti_data_to_file()
        for make in self._tensors:
            self.file.write_tensor_data(make())
        self.file.close()


def ends(writer: Writer, hidden: int, kind: str | None = None) -> None:
    """Embedding, last norm and head, and what every file says."""
    writer.file.add_vocab_size(VOCABULARY)
    writer.file.add_tokenizer_model("none")
    writer.say(block_count=writer.layers, context_length=CONTEXT, embedding_length=hidden)
    writer.say(attention_dot_layer_norm_rms_epsilon=1e-6)
    writer.weights("token_embd", VOCABULARY, hidden, kind=kind)
    writer.numbers("output_norm.weight", hidden, mean=1.0)
    writer.weights("output", VOCABULARY, hidden, kind=kind)


def attention(writer: Writer, block: str, hidden: int, heads: Dims, gate: int = 1, kind: str | None = None) -> None:
    """heads: query heads, KV heads, head_dim. gate: 2 where q_proj makes gates of the output too."""
    queries, kv_heads, head_dim = heads
    writer.numbers(f"{block}.attn_norm.weight", hidden, mean=1.0)
    writer.weights(f"{block}.attn_q", gate * queries * head_dim, hidden, kind=kind)
    for part in "kv":
        writer.weights(f"{block}.attn_{part}", kv_heads * head_dim, hidden, kind=kind)
    writer.weights(f"{block}.attn_output", hidden, queries * head_dim, kind=kind)


def experts(writer: Writer, block: str, count: int, hidden: int, width: int) -> None:
    """Router and experts."""
    writer.numbers(f"{block}.ffn_gate_inp.weight", count, hidden, deviation=hidden**-0.5)
    for part, dims in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        writer.weights(f"{block}.ffn_{part}_exps", count, *dims)


def say_heads(writer: Writer, heads: Dims, rotated: int, theta: float) -> None:
    """Sizes of the attention."""
    queries, kv_heads, head_dim = heads
    writer.say(attention_dot_head_count=queries, attention_dot_head_count_kv=kv_heads)
    writer.say(attention_dot_key_length=head_dim, attention_dot_value_length=head_dim)
    writer.say(rope_dot_dimension_count=rotated, rope_dot_freq_base=theta)


def blocks(writer: Writer) -> Iterator[tuple[int, str]]:
    """(layer, what its tensors' names begin with)."""
    return ((layer, f"blk.{layer}") for layer in range(writer.layers))


def qwen3_moe(writer: Writer) -> None:
    """s1."""
    hidden, heads = 2048, (32, 4, 128)
    ends(writer, hidden)
    say_heads(writer, heads, 128, 1e6)
    writer.say(feed_forward_length=6144, expert_feed_forward_length=768, expert_count=128, expert_used_count=8)
    for _, block in blocks(writer):
        attention(writer, block, hidden, heads)
        for part in "qk":
            writer.numbers(f"{block}.attn_{part}_norm.weight", 128, mean=1.0)
        writer.numbers(f"{block}.ffn_norm.weight", hidden, mean=1.0)
        experts(writer, block, 128, hidden, 768)


def qwen35_moe(writer: Writer) -> None:
    """s2."""
    hidden, heads = 2048, (16, 2, 256)
    ends(writer, hidden)
    say_heads(writer, heads, 64, 1e7)
    writer.file.add_rope_dimension_sections([11, 11, 10, 0])
    writer.say(expert_feed_forward_length=512, expert_shared_feed_forward_length=512)
    writer.say(expert_count=256, expert_used_count=8, full_attention_interval=4)
    writer.say(ssm_dot_conv_kernel=4, ssm_dot_state_size=128, ssm_dot_group_count=16)
    writer.say(ssm_dot_time_step_rank=32, ssm_dot_inner_size=4096)
    for layer, block in blocks(writer):
        if (layer + 1) % 4:
            delta_net(writer, block, hidden)
        else:
            attention(writer, block, hidden, heads, gate=2)
            for part in "qk":
                writer.numbers(f"{block}.attn_{part}_norm.weight", 256, mean=1.0)
        writer.numbers(f"{block}.post_attention_norm.weight", hidden, mean=1.0)
        experts(writer, block, 256, hidden, 512)
        writer.numbers(f"{block}.ffn_gate_inp_shexp.weight", hidden, deviation=hidden**-0.5)
        for part, dims in (("gate", (512, hidden)), ("up", (512, hidden)), ("down", (hidden, 512))):
            writer.weights(f"{block}.ffn_{part}_shexp", *dims)


def delta_net(writer: Writer, block: str, hidden: int) -> None:
    """16 key heads and 32 value heads of 128."""
    writer.numbers(f"{block}.attn_norm.weight", hidden, mean=1.0)
    writer.weights(f"{block}.attn_qkv", 8192, hidden)
    writer.weights(f"{block}.attn_gate", 4096, hidden)
    for part in ("beta", "alpha"):
        writer.weights(f"{block}.ssm_{part}", 32, hidden)
    writer.numbers(f"{block}.ssm_conv1d.weight", 8192, 4, deviation=0.5)
    writer.numbers(f"{block}.ssm_dt.bias", 32, mean=-2.0)
    writer.numbers(f"{block}.ssm_a", 32, mean=-1.0)
    writer.numbers(f"{block}.ssm_norm.weight", 128, mean=1.0)
    writer.weights(f"{block}.ssm_out", hidden, 4096)


def gpt_oss(writer: Writer) -> None:
    """s3."""
    hidden, heads, count = 2880, (64, 8, 64), 32
    ends(writer, hidden, "Q8_0")
    say_heads(writer, heads, 64, 150_000.0)
    writer.say(feed_forward_length=hidden, expert_feed_forward_length=hidden, expert_count=count, expert_used_count=4)
    writer.say(attention_dot_sliding_window=128)
    writer.file.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.file.add_rope_scaling_factor(32.0)
    writer.file.add_rope_scaling_orig_ctx_len(4096)
    for _, block in blocks(writer):
        attention(writer, block, hidden, heads, kind="Q8_0")
        for part, width in (("q", 4096), ("k", 512), ("v", 512), ("output", hidden)):
            writer.numbers(f"{block}.attn_{part}.bias", width, deviation=0.01)
        writer.numbers(f"{block}.attn_sinks.weight", 64, deviation=1.0)
        writer.numbers(f"{block}.post_attention_norm.weight", hidden, mean=1.0)
        experts(writer, block, count, hidden, hidden)
        writer.numbers(f"{block}.ffn_gate_inp.bias", count, deviation=0.1)
        for part in ("gate", "up", "down"):
            writer.numbers(f"{block}.ffn_{part}_exps.bias", count, hidden, deviation=0.01)


SHAPES = {"s1": ("qwen3moe", qwen3_moe), "s2": ("qwen35moe", qwen35_moe), "s3": ("gpt-oss", gpt_oss)}


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    architecture, tensors = SHAPES[options.shape]
    writer = Writer(options.target, architecture, options.type, options.layers, options.seed)
    tensors(writer)
    writer.finish()


if __name__ == "__main__":
    main()
