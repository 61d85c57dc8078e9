"""Whole models as GGUF files, written with gguf's own writer, and the same values as a float32 checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.formats import GGUF_TYPES
from hetero_attn.checkpoints.gguf.names import our_name
from hetero_attn.checkpoints.row_order import is_rotated
from hetero_attn.spec.config import tensor_names
from hetero_attn.spec.families.family import Family
from hetero_attn.spec.families.table import FAMILIES
from hetero_attn.spec.tensor_names import tensor_name
from tests.support.models.gguf_data import dequantised, random_rows
from tests.support.models.toy import make_checkpoint, make_family_checkpoint

TYPES = {item.name: item for item in GGUF_TYPES.values()}
Metadata = Mapping[str, int | float | str | tuple[bool, ...] | list[float]]
SAID_AS = {"olmo3": "olmo2"}  # families whose GGUF files have the architecture of another
TOKENS = ["<unk>", "<s>", "</s>", "<|end|>"]


def names(layers: int) -> dict[str, str]:
    """Our names of tensors to GGUF's."""
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")
    parts += ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_attention_norm", "post_ffw_norm")
    theirs = [f"blk.{layer}.{part}" for layer in range(layers) for part in parts]
    theirs += ["token_embd", "output_norm", "output"]
    return {our_name(f"{name}.{kind}"): f"{name}.{kind}" for name in theirs for kind in ("weight", "bias")}


def special_names(family: Family, layers: int) -> dict[str, str]:
    """Our names to GGUF's where a family's files have others than Llama's, and theirs to those of fused tensors."""
    found = {}
    for layer in range(layers):
        for theirs, word in family.gguf.parts:
            found[tensor_name(word, layer)] = f"blk.{layer}.{theirs}.weight"
        for name, words in family.tensor_names.fused:
            theirs = next(theirs for theirs, held in family.gguf.fused if held == words)
            for kind in ("weight", "bias"):
                found[f"model.layers.{layer}.{name}.{kind}"] = f"blk.{layer}.{theirs}.{kind}"
    return found


def permuted(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k as the architecture llama stores them: pairs that are rotated together lie side by side."""
    heads = values.view(-1, 2, head_dim // 2, *values.shape[1:])
    return heads.transpose(1, 2).reshape(values.shape)


def coded(values: torch.Tensor, kind: str, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """(bytes in the file, float32 values they stand for) of rows of about this size, in a type."""
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        narrow = values.to(dtype)
        data = narrow.view(torch.int16).numpy().view(np.uint16) if kind == "BF16" else narrow.numpy()
        return data, narrow.float()
    try:
        rows = torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind]))
    except NotImplementedError:  # types that gguf cannot make: any bytes are valid, and scales make them of this size
        rows = scaled(random_rows(TYPES[kind], values.shape[0], values.shape[1], seed), kind, values.std().item())
    return rows.numpy(), dequantised(TYPES[kind], rows)


def scaled(rows: torch.Tensor, kind: str, deviation: float) -> torch.Tensor:
    """The rows with their float16 scales multiplied so that values deviate by about as much."""
    factor = deviation / dequantised(TYPES[kind], rows).std().item()
    blocks = rows.view(rows.shape[0], -1, TYPES[kind].block_bytes)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        halves = blocks[..., at : at + 2].contiguous().view(torch.float16)
        blocks[..., at : at + 2] = (halves * factor).half().view(torch.uint8)
    return rows


def make_family_gguf(folder: Path, family: str, metadata: Metadata, **values) -> tuple[Path, Path]:
    """(GGUF file in Q8_0, directory of the same values in float32) of any family that has an architecture in GGUF.

    metadata: further keys, without the architecture; a list of numbers is a tensor of that name, a tuple an array. values: of
    `make_family_checkpoint`.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = sizes | {"head_dim": 64, "num_hidden_layers": 2} | values
    plain = make_family_checkpoint(folder / "plain", family, **values)
    shape = {
        "hidden": values["hidden_size"],
        "intermediate": values["intermediate_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "layers": values["num_hidden_layers"],
    }
    return _write_gguf(folder, plain, family, {}, "Q8_0", shape, metadata), plain


def make_gguf(
    folder: Path, kinds: Mapping[str, str], default: str = "Q8_0", family: str = "llama", **shape
) -> tuple[Path, Path]:
    """(GGUF file, directory of the same values in float32).

    kinds: GGUF type by part, such as {"attn_v": "Q6_K"}; default: of the other matrices. shape: of `make_checkpoint`.
    """
    shape = {"hidden": 256, "intermediate": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "layers": 2} | shape
    plain = make_checkpoint(folder / "plain", family, **shape)
    return _write_gguf(folder, plain, family, kinds, default, shape, {}), plain


def eps_of_files(plain: Path, key: str = "rms_norm_eps") -> float:
    """The eps of norms of a directory, rewritten there as the float32 number that a GGUF file keeps of it: a norm adds it
    in float64, where the other number now and then rounds a row the other way."""
    config = json.loads((plain / "config.json").read_text())
    config[key] = float(np.float32(config[key]))
    (plain / "config.json").write_text(json.dumps(config))
    return config[key]


def _write_gguf(
    folder: Path,
    plain: Path,
    family: str,
    kinds: Mapping[str, str],
    default: str,
    shape: Mapping[str, int],
    metadata: Metadata,
) -> Path:
    """Write the file, and the values that it holds back into the plain checkpoint."""
    tensors, declared = load_file(plain / "model.safetensors"), FAMILIES[SAID_AS.get(family, family)]
    theirs = names(shape["layers"]) | special_names(declared, shape["layers"])
    architecture, ours = declared.gguf.architecture, tensor_names(plain).ours
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    add_metadata(writer, family, shape)
    eps = eps_of_files(plain, declared.eps_key)
    said = {"rope.freq_base": 10000.0, declared.gguf.eps_key.removeprefix("."): eps} | dict(metadata)
    for key, value in said.items():
        if isinstance(value, list):
            writer.add_tensor(key, np.array(value, np.float32))
            continue
        if isinstance(value, tuple):
            writer.add_array(f"{architecture}.{key}", value)
            continue
        adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add = adders[type(value)]
        add(f"{architecture}.{key}", value)
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        target = theirs[ours(name)]
        kind = kinds.get(target.split(".")[-2], default) if values.dim() > 1 else "F32"
        if values.dim() == 1 and family.startswith("gemma"):
            writer.add_tensor(target, (values + 1).numpy())
            continue
        swap = is_rotated(name) and declared.gguf.is_turned and not declared.tensor_names.is_turned
        data, exact = coded(permuted(values, shape["head_dim"]) if swap else values, kind, seed)
        if swap:
            heads = exact.view(-1, shape["head_dim"] // 2, 2, *exact.shape[1:])
            exact = heads.transpose(1, 2).reshape(exact.shape)
        tensors[name] = exact.contiguous()
        raw = None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(target, data.view(np.uint8) if kind == "BF16" else data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.gguf"


def add_metadata(writer: gguf.GGUFWriter, family: str, shape: Mapping[str, int]) -> None:
    """What `make_checkpoint` says of the same model, and its byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    writer.add_context_length(shape.get("max_position_embeddings", 512))
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["intermediate"])
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    tokens = [*TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(TOKENS) + [1] * (len(tokens) - len(TOKENS)))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}")
