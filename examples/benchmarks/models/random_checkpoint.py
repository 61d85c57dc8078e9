"""A model of random weights, of a known shape, as a Hugging Face checkpoint and as GGUF: something to time.

    python examples/benchmarks/models/random_checkpoint.py hf   SHAPE DIRECTORY
    python examples/benchmarks/models/random_checkpoint.py gguf DIRECTORY FILE --type BF16|Q8_0|Q4_0

Speed does not depend on what the weights are, only on their shapes and dtypes, so nothing has to be downloaded. Both
files hold the same weights: the GGUF is made from the checkpoint, in the rounding of the `gguf` package, and a
comparison can check that two programs compute the same logits. No tokenizer: prompts are token ids. Every weight of a
quantised GGUF is in its one type, embedding included (llama.cpp's own tool keeps that one larger, so the peer reads
fewer bytes here). Needs numpy, and `gguf` for the second command. One tensor at most is in memory.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GGUF_TYPES = ("BF16", "Q8_0", "Q4_0")
VALUES_AT_ONCE = 1 << 22  # made or converted in one numpy call
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a Llama with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float = 500_000.0
    rms_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name, in the order they are stored."""
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            tensors |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (self.hidden_size,),
                    "self_attn.q_proj": (q_rows, self.hidden_size),
                    "self_attn.k_proj": (kv_rows, self.hidden_size),
                    "self_attn.v_proj": (kv_rows, self.hidden_size),
                    "self_attn.o_proj": (self.hidden_size, q_rows),
                    "post_attention_layernorm": (self.hidden_size,),
                    "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
                    "mlp.up_proj": (self.intermediate_size, self.hidden_size),
                    "mlp.down_proj": (self.hidden_size, self.intermediate_size),
                }.items()
            }
        return tensors | {"model.norm.weight": (self.hidden_size,)}


SHAPES = {
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128_256, 131_072),
    # Its layers, half as many, and a small vocabulary: what takes long is what every layer repeats.
    "llama-3.2-1b-half": Shape(2048, 8, 32, 8, 64, 8192, 32_768, 131_072),
    "tiny": Shape(256, 2, 4, 2, 64, 512, 1024, 131_072),
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_checkpoint(shape: Shape, directory: Path, seed: int = 0) -> None:
    """Write config.json and one bf16 safetensors file into `directory`, made if need be; nothing is left half done."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.SFC64(seed))
    partial = directory / (MODEL_FILE + ".partial")
    with partial.open("wb") as file:
        file.write(header_of(shape))
        for dims in shape.tensors().values():
            for piece in _random_pieces(generator, dims):
                piece.tofile(file)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    partial.rename(directory / MODEL_FILE)


def header_of(shape: Shape) -> bytes:
    """The beginning of the shape's safetensors file: where each bf16 tensor lies, in the order of `tensors`."""
    header, offset = {}, 0
    for name, dims in shape.tensors().items():
        stop = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_gguf(directory: Path, target: Path, gguf_type: str) -> None:
    """Write the checkpoint in `directory` as a GGUF of one weight type, one of GGUF_TYPES; norms stay float32.

    Raises ImportError without the `gguf` package.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[gguf_type]
    tensors = _open_tensors(directory / MODEL_FILE)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, config, gguf_type, gguf)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for name, bits in tensors.items():
        if bits.ndim == 1:
            writer.add_tensor_info(_gguf_name(name), bits.shape, np.dtype(np.float32), 4 * bits.size)
        else:
            stored = (bits.shape[0], bits.shape[1] // block_values * block_bytes)
            writer.add_tensor_info(_gguf_name(name), stored, np.dtype(np.uint8), math.prod(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    last: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, bits in tensors.items():
        if bits.ndim == 1:
            writer.write_tensor_data(_widen(bits))
            continue
        place = name.rpartition(".layers.")[2].partition(".")[2]
        if place not in last or not np.array_equal(last[place][0], bits):  # a benchmark may repeat one layer's values
            last[place] = bits, _convert(_for_adjacent_pairs(name, bits, config), kind, gguf)
        writer.write_tensor_data(last[place][1])
    writer.close()
    partial.rename(target)


def _random_pieces(generator: np.random.Generator, dims: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Values of one tensor as bf16 bits, uint16, piece by piece: ones for norms, else of a size that keeps activations
    near 1."""
    if len(dims) == 1:
        yield np.full(dims, 0x3F80, dtype=np.uint16)
        return
    total, scale = math.prod(dims), np.float32(dims[1] ** -0.5)
    for start in range(0, total, VALUES_AT_ONCE):
        values = generator.standard_normal(min(VALUES_AT_ONCE, total - start), dtype=np.float32)
        values *= scale
        bits = values.view(np.uint32)
        yield ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _open_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a bf16 safetensors file by name, uint16, mapped and not read."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
    return {
        name: data[slice(*entry["data_offsets"])].view(np.uint16).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _convert(bits: np.ndarray, kind: "GGMLQuantizationType", gguf: ModuleType) -> np.ndarray:
    """A matrix of bf16 bits in a GGUF type: uint8 [rows, bytes of a row]."""
    if kind == gguf.GGMLQuantizationType.BF16:
        return np.ascontiguousarray(bits).view(np.uint8)
    step = max(1, VALUES_AT_ONCE // bits.shape[1])
    pieces = range(0, bits.shape[0], step)
    return np.concatenate([gguf.quants.quantize(_widen(bits[start : start + step]), kind) for start in pieces])


def _for_adjacent_pairs(name: str, bits: np.ndarray, config: dict[str, int]) -> np.ndarray:
    """Rows of q and k in the order llama.cpp rotates them: its pairs are (2i, 2i+1) where the checkpoint's are
    (i, i + head_dim/2)."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            halves = bits.reshape(config[heads], 2, config["head_dim"] // 2, bits.shape[1])
            return halves.transpose(0, 2, 1, 3).reshape(bits.shape)
    return bits


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def _add_metadata(writer: "GGUFWriter", config: dict[str, object], gguf_type: str, gguf: ModuleType) -> None:
    writer.add_name("random weights")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_type}"])
    writer.add_tokenizer_model("none")


def main() -> None:
    """Read the command line and write one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    hf = commands.add_parser("hf", help="write a Hugging Face checkpoint")
    hf.add_argument("shape", choices=SHAPES)
    hf.add_argument("directory", type=Path)
    hf.add_argument("--seed", type=int, default=0)
    convert = commands.add_parser("gguf", help="write a checkpoint as GGUF")
    convert.add_argument("directory", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--type", choices=GGUF_TYPES, required=True)
    options = parser.parse_args()
    if options.command == "hf":
        write_checkpoint(SHAPES[options.shape], options.directory, options.seed)
    else:
        write_gguf(options.directory, options.target, options.type)


if __name__ == "__main__":
    main()
