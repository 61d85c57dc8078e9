"""The files of a model that a tokenizer is opened from: a folder's own, or what a GGUF file says of itself.

transformers is imported only for files that tokenizer.json alone does not decide, because importing it takes a second.
Remote code is never trusted.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.gguf.tokenizer import gguf_tokenizer
from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.checkpoints.transformers_import import transformers_part
from hetero_attn.engine.host_memory import free_address_space
from hetero_attn.errors import ConfigError, MemoryBudgetError
from hetero_attn.serving.text.foreign import failures_told
from hetero_attn.serving.text.plain_tokenizer import PlainTokenizer, is_generic, plain_tokenizer, template_in
from hetero_attn.spec.json_fields import read_json
from placement.plan.units import format_bytes

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
LEAST_BYTES_TO_OPEN = 128 << 20  # of the tokenizers package, its threads' stacks and a large vocabulary


def has_tokenizer(path: str | Path, known: KnownHeaders | None = None) -> bool:
    """Whether a model carries a tokenizer; without one, prompts must be token ids. known: as for `open_beside`."""
    path = Path(path)
    if is_gguf(path):
        with GgufCheckpoint.open(path, known) as source:
            return "tokenizer.ggml.tokens" in source.fields.values
    return any((path / name).is_file() for name in _FILES)


def tokenizer_of_gguf(path: Path, known: KnownHeaders | None = None) -> PlainTokenizer:
    """The tokenizer that a GGUF file's metadata describe, with the chat template beside the file if there is one.
    known: as for `open_beside`."""
    with GgufCheckpoint.open(path, known) as source:
        found = gguf_tokenizer(source.fields)
    return PlainTokenizer(found.backend, found.named, template_in(path.parent) or found.chat_template)


def tokenizer_of_folder(path: Path) -> Any:
    """The tokenizer of a folder's files, of `tokenizers` alone or of transformers.

    Raises ConfigError where there are none, where they are damaged or need remote code, and MemoryBudgetError.
    """
    if not has_tokenizer(path):
        raise ConfigError(
            f"{path}: no tokenizer found ({', '.join(_FILES)}); download its files or give prompts as token ids"
        )
    _check_address_space(path)
    # Damaged files surface as nearly any exception type of transformers, tokenizers or sentencepiece.
    with failures_told(lambda why: ConfigError(f"{path}: the tokenizer cannot be loaded: {why}; {_way_out(path)}")):
        return plain_tokenizer(path) or _loaded(path)


def _way_out(path: Path) -> str:
    """What helps against a tokenizer that cannot be opened."""
    only_sentencepiece = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
    if only_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        return "tokenizer.model needs the sentencepiece package: pip install sentencepiece protobuf"
    return "download the tokenizer again or give prompts as token ids; a model's code is never run"


def _check_address_space(path: Path) -> None:
    """Raise MemoryBudgetError where memory would run out in tokenizers, which then ends the process with an abort."""
    free_bytes = free_address_space()
    if free_bytes is not None and free_bytes < LEAST_BYTES_TO_OPEN:
        raise MemoryBudgetError(
            f"{path}: opening the tokenizer takes up to {format_bytes(LEAST_BYTES_TO_OPEN)} of address space, and the "
            f"limit of this process leaves {format_bytes(free_bytes)}; raise the limit (ulimit -v)"
        )


def _loaded(path: Path) -> Any:
    """The tokenizer of transformers for a directory.

    A tokenizer.json of no family's own class is opened without AutoTokenizer, which first imports every family's.
    """
    named = path / "tokenizer_config.json"
    config = read_json(named) if named.is_file() else {}
    if (path / "tokenizer.json").is_file() and is_generic(config):
        return transformers_part("PreTrainedTokenizerFast").from_pretrained(str(path), local_files_only=True)
    return transformers_part("AutoTokenizer").from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
