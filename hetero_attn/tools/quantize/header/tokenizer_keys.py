"""A tokenizer.json as the metadata of a GGUF file.

The file has only a name for the way in which text is split. The name is found by trying: each that is known here is
read back as the file's reader will, and must give the same ids as the tokenizer itself on lines that tell them apart.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.tokenizer import CONTROL, KNOWN_SPLITS, NORMAL, UNUSED, USER, gguf_tokenizer
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.serving.text.files import has_tokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.json_fields import JsonFields, read_json

MAX_FILE_BYTES = 256 << 20
_OTHER_SOURCE = "take a GGUF file of the model as the source"
LINES = (
    "Hello world, it's 2024 and I'VE 12345678 reasons; they'll say 3.14159!",
    "  leading, trailing  \n\n\tTabs\tand\r\nlines   \n",
    "CamelCaseWords HTTPServer naïve café Straße ÅNGSTRÖM ǅ",
    "你好,世界。今天是2024年1月。こんにちは 世界 안녕하세요 สวัสดี мир",
    'emoji 😀👩‍👩‍👧 and \u00a0odd\u2003spaces, a/b\\c //comment\n/* x */ {"key": [1, 22, 333]}',
    "def f(x):\n    return x ** 2 - 1e-5 if x >= 0 else -x\n",
    "e\u0301 decomposed, ½ ² ٣٤ ๕ Ⅳ",
    "'s 'S 'd'LL we're You'Re",
    "",
    " ",
    "...!!!???---___",
)


def tokenizer_metadata(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer of a model directory; empty where there is none.

    Raises UnsupportedModelError for one whose ids no known name gives.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        if has_tokenizer(path):
            raise UnsupportedModelError(
                f"{path}: the tokenizer is there, but not as tokenizer.json, of which the file's is made; write that "
                f"with transformers' AutoTokenizer.from_pretrained and save_pretrained, or {_OTHER_SOURCE}"
            )
        return {}
    fields = JsonFields(file, read_json(file, MAX_FILE_BYTES))
    candidates = _candidates(fields)
    tokenizer = Tokenizer.open(path, config.vocab_size)
    found = _lists(fields, config.vocab_size) | _ids(tokenizer, config)
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    wanted = [tokenizer.encode(line) for line in LINES]
    for kind, name in candidates:
        tried = found | {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": name}
        read = gguf_tokenizer(GgufFields(file, tried | {"general.architecture": ""})).backend
        if all(read.encode(line).ids == ids for line, ids in zip(LINES, wanted, strict=True)):
            return tried
    raise UnsupportedModelError(
        f"{file}: text is split in a way that no name known here stands for ({', '.join(KNOWN_SPLITS)}), so other "
        f"programs would read other tokens; {_OTHER_SOURCE}"
    )


def _candidates(fields: JsonFields) -> list[tuple[str, str]]:
    """(model, pre) to try."""
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise UnsupportedModelError(
            f"{fields.path}: the tokenizer is {str(found)[:40]!r}, and only BPE is written; {_OTHER_SOURCE}"
        )
    if model.get("byte_fallback"):
        return [("llama", "default")]
    return [("gpt2", name) for name in KNOWN_SPLITS]


def _lists(fields: JsonFields, vocab_size: int) -> dict[str, Any]:
    """Tokens with their types, merges, and scores of the order of merges."""
    model = fields.get("model") or {}
    vocab = dict(model.get("vocab") or {})
    added = {item["content"]: item for item in fields.get("added_tokens") or []}
    vocab |= {content: item["id"] for content, item in added.items()}
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], np.full(vocab_size, UNUSED, np.int32)
    for token, index in vocab.items():
        tokens[index] = token
        special = added.get(token)
        types[index] = NORMAL if special is None else CONTROL if special.get("special") else USER
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    found = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if not model.get("byte_fallback"):
        return found | {"tokenizer.ggml.merges": merges}
    order = {"".join(pair.split(" ")): rank for rank, pair in reversed(list(enumerate(merges)))}
    scores = np.array([-float(order.get(token, len(merges))) for token in tokens], np.float32)
    return found | {"tokenizer.ggml.scores": scores}


def _ids(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    ends = tuple(tokenizer.eos_token_ids) or config.eos_token_ids
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    found: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bos is not None and whole[:1] == [bos] != plain[:1],
        "tokenizer.ggml.add_eos_token": bool(ends) and whole[-1:] == [ends[0]] != plain[-1:],
    }
    further = [end for end in config.eos_token_ids if end not in ends]
    named = {"bos": bos, "eos": ends[0] if ends else None, "eot": further[0] if further else None}
    named["padding"] = config.pad_token_id
    return found | {f"tokenizer.ggml.{name}_token_id": index for name, index in named.items() if index is not None}
