"""Toy models with gated DeltaNet as GGUF files, laid out as llama.cpp's converter does, and the same values in float32."""

from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.spec.config import ModelConfig
from tests.support.models.gguf_models import add_metadata, coded, eps_of_files
from tests.support.models.moe import gguf_name, make_moe

ARCHITECTURES = {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "intermediate_size": 96,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
}
NAMES = {
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
    "in_proj_ba": "ssm_ba",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
}


def tiled(values: torch.Tensor, key_heads: int, rows: int, dim: int = 0) -> torch.Tensor:
    """Value heads of `rows` each, grouped by their key head, in the order: the first of every key head, the second .."""
    by_head = values.unflatten(dim, (key_heads, -1, rows))
    return by_head.transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()


def untiled(values: torch.Tensor, key_heads: int, rows: int, dim: int = 0) -> torch.Tensor:
    """The same back."""
    by_head = values.unflatten(dim, (-1, key_heads, rows))
    return by_head.transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()


def delta_gguf(folder: Path, family: str, kind: str = "Q8_0", says: dict[str, int] | None = None) -> tuple[Path, Path]:
    """(GGUF file with its matrices in a type, directory of the same values in float32). says: metadata that is wrong."""
    shape = (
        SHAPE
        if "moe" in family or "next" in family
        else {k: v for k, v in SHAPE.items() if "expert" not in k and "moe" not in k}
    )
    plain = make_moe(folder / "plain", family, layers=4, **shape | {"layer_types": None})
    eps_of_files(plain)
    config, tensors = ModelConfig.from_dir(plain), load_file(plain / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", ARCHITECTURES[family])
    _metadata(writer, family, config, says or {})
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    for seed, name in enumerate(sorted(tensors)):
        for target, expert, data, exact in _written(name, tensors[name], family, config, kind, seed):
            tensors[name] = exact if tensors[name].shape == exact.shape else exact.view(tensors[name].shape)
            if expert is not None:
                stacked.setdefault(target, {})[expert] = torch.from_numpy(data)
            elif data.dtype == "float32":
                writer.add_tensor(target, data)
            else:
                writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        if "in_proj_qkvz" in name:
            tensors[name] = _with_qkvz(writer, name, tensors[name], config, kind, seed)
    for target, experts in stacked.items():
        rows = torch.stack([experts[index] for index in sorted(experts)]).numpy()
        writer.add_tensor(target, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, plain / "model.safetensors", metadata={"format": "pt"}
    )
    return folder / "model.gguf", plain


def _metadata(writer: gguf.GGUFWriter, family: str, config: ModelConfig, says: dict[str, int]) -> None:
    delta, sizes = config.delta, {"hidden": 128, "layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    add_metadata(writer, family, sizes | {"intermediate": config.intermediate_size})
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rope.rotary_dim)
    writer.add_ssm_conv_kernel(delta.kernel)
    writer.add_ssm_state_size(delta.key_dim)
    writer.add_ssm_group_count(says.get("ssm.group_count", delta.key_heads))
    writer.add_ssm_time_step_rank(delta.value_heads)
    writer.add_ssm_inner_size(delta.value_width)
    writer.add_uint32(f"{ARCHITECTURES[family]}.full_attention_interval", 4)
    if family != "qwen3_next":
        writer.add_rope_dimension_sections([2, 1, 1, 0])
    if config.experts is not None:
        writer.add_expert_count(config.experts.experts)
        writer.add_expert_used_count(config.experts.per_row)
        writer.add_expert_feed_forward_length(64)
        writer.add_expert_shared_feed_forward_length(96)


def _written(name: str, values: torch.Tensor, family: str, config: ModelConfig, kind: str, seed: int):
    """(name in the file, which expert, what lies there, the values that it stands for) of a tensor."""
    delta, is_tiled = config.delta, family != "qwen3_next"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if "in_proj_qkvz" in name:
        return
    if not rest.startswith("linear_attn."):
        target, expert = gguf_name(name, "glm4_moe")  # whose norm behind attention goes by the same name
        if values.dim() == 1:
            yield target, None, (values + 1.0).numpy(), values
        elif "gate_inp" in target:
            yield target, None, values.squeeze(0).numpy(), values
        else:
            yield target, expert, *coded(values, kind, seed)
        return
    part, _, word = rest.removeprefix("linear_attn.").rpartition(".")
    heads = delta.key_heads

    def ours(rows: torch.Tensor, size: int) -> torch.Tensor:
        return tiled(rows, heads, size) if is_tiled else rows

    if word == "A_log":
        yield f"blk.{layer}.ssm_a", None, ours(-values.exp(), 1).numpy(), values
    elif word == "dt_bias":
        yield f"blk.{layer}.ssm_dt.bias", None, ours(values, 1).numpy(), values
    elif part == "norm":
        yield f"blk.{layer}.ssm_norm.weight", None, values.numpy(), values
    elif part == "conv1d":
        rows, border = values.squeeze(1), 2 * delta.key_width
        data = torch.cat([rows[:border], ours(rows[border:], delta.value_dim)])
        yield f"blk.{layer}.ssm_conv1d.weight", None, data.numpy(), values
    elif part == "out_proj":
        moved = tiled(values, heads, delta.value_dim, 1) if is_tiled else values
        data, exact = coded(moved, kind, seed)
        exact = untiled(exact, heads, delta.value_dim, 1) if is_tiled else exact
        yield f"blk.{layer}.ssm_out.weight", None, data, exact
    else:
        border = 2 * delta.key_width if part == "in_proj_qkv" else 0
        size = delta.value_dim if part in ("in_proj_qkv", "in_proj_z") else 1
        moved = torch.cat([values[:border], ours(values[border:], size)]) if part != "in_proj_ba" else values
        data, exact = coded(moved, kind, seed)
        if is_tiled:
            exact = torch.cat([exact[:border], untiled(exact[border:], heads, size)])
        yield f"blk.{layer}.{NAMES[part]}.weight", None, data, exact


def _with_qkvz(writer, name: str, values: torch.Tensor, config: ModelConfig, kind: str, seed: int) -> torch.Tensor:
    """Write [q, k, v, z] of each key head as all q, all k, all v in one tensor, and z in another; what they stand for."""
    delta, layer = config.delta, name.removeprefix("model.layers.").partition(".")[0]
    widths = [delta.rows_per_key_head(part) for part in ("delta_q", "delta_k", "delta_v", "delta_z")]
    *qkv, z = (part.flatten(0, 1) for part in values.unflatten(0, (delta.key_heads, -1)).split(widths, 1))
    exact = []
    for target, rows in (("attn_qkv", torch.cat(qkv)), ("attn_gate", z)):
        data, stood_for = coded(rows.contiguous(), kind, seed)
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"blk.{layer}.{target}.weight", data, raw_dtype=raw)
        exact.append(stood_for)
    parts = (*exact[0].split([part.shape[0] for part in qkv]), exact[1])
    return torch.cat([part.unflatten(0, (delta.key_heads, -1)) for part in parts], 1).flatten(0, 1)
