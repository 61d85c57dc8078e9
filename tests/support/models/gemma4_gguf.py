"""Toy Gemma 4 as a GGUF file, laid out as llama.cpp's converter does, and the same values in float32."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.spec.config import ModelConfig
from tests.support.models.gguf_models import coded, eps_of_files
from tests.support.models.moe import make_moe

ARCHITECTURE, LAYERS, HIDDEN, WIDTH = "gemma4", 4, 128, 64
SHAPE = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": WIDTH,
    "tie_word_embeddings": True,
}
VOCAB = 307
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
USER, CHARACTERS = ("<|channel>",), ("▁", "\n", *"abcdehlo")
MERGES = (("\n", "\n"), ("h", "e"), ("l", "l"), ("▁", "a"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁"))
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "self_attn.o_proj": "attn_output",
    "router.proj": "ffn_gate_inp",
    **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
    **{f"self_attn.{each}_norm": f"attn_{each}_norm" for each in "qk"},
    **{f"mlp.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OTHERS = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def gemma4_gguf(
    folder: Path, kind: str = "Q8_0", says: dict[str, Any] | None = None, apart: bool = False, **changes: Any
) -> tuple[Path, Path]:
    """(GGUF file with its matrices in a type, directory of the same values in float32).

    says: metadata beside the model's own, or instead of it. apart: whether gate and up of the experts are a tensor each.
    """
    plain = make_moe(folder / "plain", "gemma4_text", layers=LAYERS, **SHAPE | changes)
    eps_of_files(plain)
    config, tensors = ModelConfig.from_dir(plain), load_file(plain / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", ARCHITECTURE)
    _metadata(writer, config, says or {})
    still = [1.0 if divisor < 1e9 else 1e30 for divisor in config.rope_of(1).divisors]
    writer.add_tensor("rope_freqs.weight", np.array(still, np.float32))
    for seed, (name, values) in enumerate(sorted(tensors.items())):
        target = gguf_name(name)
        if values.dim() == 1 or "gate_inp" in target:
            writer.add_tensor(target, values.numpy())
            continue
        data, exact = coded(values.reshape(-1, values.shape[-1]), kind, seed)
        tensors[name] = exact.reshape(values.shape).contiguous()
        rows = data.reshape(*values.shape[:-1], -1)
        for part, cut in _parts(target, rows, apart):
            raw = None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(part, np.ascontiguousarray(cut), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.gguf", plain


def gguf_name(name: str) -> str:
    """Name in the file of a tensor of transformers."""
    if name in WHOLE:
        return WHOLE[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{OTHERS.get(part) or f'{NAMES[stem]}.{kind}'}"


def _parts(target: str, rows: np.ndarray, apart: bool) -> list[tuple[str, np.ndarray]]:
    if not apart or "gate_up" not in target:
        return [(target, rows)]
    half = rows.shape[1] // 2
    return [
        (target.replace("gate_up", "gate"), rows[:, :half]),
        (target.replace("gate_up", "up"), rows[:, half:]),
    ]


def _metadata(writer: gguf.GGUFWriter, config: ModelConfig, says: dict[str, Any]) -> None:
    full_heads, full_dim = config.full_attention
    windows = config.sliding_window
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.key_length": full_dim,
        "attention.value_length": full_dim,
        "attention.head_count_kv": [config.num_kv_heads if window else full_heads for window in windows],
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": max(windows),
        "attention.sliding_window_pattern": [bool(window) for window in windows],
        "attention.shared_kv_layers": 0,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": config.logit_cap,
        "rope.dimension_count": full_dim,
        "rope.dimension_count_swa": config.head_dim,
        "rope.freq_base": config.rope_of(1).theta,
        "rope.freq_base_swa": config.rope.theta,
    }
    if config.experts is not None:
        values |= {"expert_count": config.experts.experts, "expert_used_count": config.experts.per_row}
        values |= {"expert_feed_forward_length": WIDTH}
    for key, value in (values | says).items():
        add = {list: writer.add_array, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{ARCHITECTURE}.{key}", value)
    _add_tokenizer(writer)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Characters with ▁ for a space, bytes for the others, merges in the file; some tokens that only templates write."""
    bytes_of = [f"<0x{value:02X}>" for value in range(256)]
    made = [left + right for left, right in MERGES]
    tokens = [*CONTROL, *bytes_of, *USER, *CHARACTERS, *made]
    spare = [f"<unused{index}>" for index in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list([*tokens, *spare])
    writer.add_token_scores([-float(index) for index in range(VOCAB)])
    kinds = ([3] * len(CONTROL), [6] * 256, [4] * len(USER), [1] * len((*CHARACTERS, *made)), [3] * len(spare))
    writer.add_token_types([kind for run in kinds for kind in run])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    for index, add in enumerate((writer.add_pad_token_id, writer.add_eos_token_id, writer.add_bos_token_id)):
        add(index)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def logits_tokens(count: int, seed: int = 4) -> list[int]:
    """Tokens of a toy prompt."""
    return torch.randint(260, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
