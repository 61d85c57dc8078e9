"""Toy checkpoints with random weights, and what transformers computes from them: the oracle of whole-model tests.

The weights are scaled so that logits spread (a wrong score changes the next token), norm weights are away from one and
biases away from zero, so that a forgotten norm, bias or window shows. transformers is imported on first use only.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

Written = tuple[tuple[str, int, int], ...]  # name, bytes and time of each file
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    layers: int = 3,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 40,
    hidden: int = 72,
    intermediate: int = 150,
    vocab: int = 307,
    max_position_embeddings: int = 512,
    rope: str | dict[str, Any] = "default",
    tied: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    biases: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of random weights, with a byte-level tokenizer, as transformers writes it.

    Args:
        path: directory to write, made if absent. family: one of FAMILIES.
        vocab: at least 260, the ids of the tokenizer.
        rope: a key of ROPES, or rope parameters in the new Hugging Face form.
        sharded: several weight files and an index. dtype: of the weights on disk.
        sliding_window: tokens; Mistral applies it to all layers, Qwen to all but the first.
        biases: attention and MLP biases where the family can have them (Qwen2 always has qkv biases).

    Returns:
        `path`.
    """
    config = _hf_config(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(ROPES[rope] if isinstance(rope, str) else rope),
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **_family_switches(family, sliding_window, biases),
    )
    model = random_model(config, seed).to(dtype)
    model.generation_config.eos_token_id = [2, 3]
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(path, max_shard_size=total_bytes // 3 if sharded else "1GB")
    save_tokenizer(path)
    return Path(path)


def make_family_checkpoint(path: Path, family: str, *, seed: int = 0, **values: Any) -> Path:
    """Write a small checkpoint of any family of transformers: random weights, every vector drawn anew.

    values: of its config, beside small sizes for all.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 307,
        "hidden_size": 72,
        "intermediate_size": 150,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    model = random_model(_hf_config(family, **sizes | values), seed)
    model.save_pretrained(path)
    save_tokenizer(path)
    return Path(path)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object file; a value of `...` removes its key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def hf_logits(path: Path, token_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of transformers, eager attention, on one sequence: float32 [len(token_ids), vocab]."""
    return _known_logits(path, _written(path), tuple(token_ids), dtype).clone()


@lru_cache(maxsize=256)  # plans of one model are compared with the same
def _known_logits(path: Path, written: Written, token_ids: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode():
        return _known_model(path, written, dtype)(torch.tensor([token_ids])).logits[0].float()


def _written(path: Path) -> Written:
    """What tells a model from another one that is written to the same folder: its files."""
    stats = {file.name: file.stat() for file in path.iterdir()}
    return tuple((name, stats[name].st_size, stats[name].st_mtime_ns) for name in sorted(stats))


def hf_generate(path: Path, token_ids: list[int], max_tokens: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """New token ids of transformers' greedy decoding; end-of-sequence tokens do not stop it."""
    with torch.inference_mode():
        prompt = torch.tensor([token_ids])
        output = hf_model(path, dtype).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return output[0, len(token_ids) :].tolist()


def hf_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint loaded by transformers in eval mode, kept for the rest of the test run."""
    return _known_model(path, _written(path), dtype)


@cache
def _known_model(path: Path, written: Written, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def save_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer without merges: 4 special tokens, 256 bytes and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>", "<|end|>"]
    vocab = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    fast.save_pretrained(path)


def _family_switches(family: str, sliding_window: int | None, biases: bool) -> dict[str, Any]:
    switches: dict[str, Any] = {}
    if family in ("llama", "qwen3"):
        switches["attention_bias"] = biases
    if family == "llama":
        switches["mlp_bias"] = biases
    if family == "mistral":
        switches["sliding_window"] = sliding_window
    if family in ("qwen2", "qwen3"):
        switches |= {"use_sliding_window": sliding_window is not None, "max_window_layers": 1}
        switches["sliding_window"] = sliding_window
    return switches


def _hf_config(family: str, **values: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **values)


def random_model(config: Any, seed: int) -> Any:
    """A float32 model: linears keep the variance of their input, norms lie around one, biases around zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
    return model
