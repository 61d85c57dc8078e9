"""The tokenizer of a tokenizer.json without transformers, whose import takes a second of every start.

Only where the file alone decides: the generic classes of transformers, settings beside the file that say nothing else,
and at most one chat template. For the rest transformers is asked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.errors import ConfigError
from hetero_attn.spec.json_fields import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TEMPLATE_NAME, MOST_TEMPLATE_BYTES = "chat_template.jinja", 1 << 20
# Characters from which a text is read as a batch of one: `encode` holds the interpreter until it ends, which of so many
# takes 20 ms, and a batch starts the threads of `tokenizers`.
LONG_TEXT = 1 << 14
# Classes of transformers that are what tokenizer.json says and nothing else.
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Settings of tokenizer_config.json that change neither ids nor text.
_HARMLESS = {
    *NAMED_TOKENS,
    "added_tokens_decoder",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "tokenizer_class",
    "truncation_side",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# transformers repairs how some Mistral files of this size split text.
_MOST_TOKENS_NOT_LOOKED_AT = 100_000


class PlainTokenizer:
    """What `Tokenizer` asks of a tokenizer of transformers, answered by `tokenizers` alone.

    backend: of the `tokenizers` package. named: the contents of bos_token and such. chat_template: of conversations,
    None where there is none.
    """

    def __init__(self, backend: "Tokenizer", named: Mapping[str, str], chat_template: str | None) -> None:
        self._backend, self._named, self.chat_template = backend, named, chat_template
        backend.no_truncation()
        backend.no_padding()
        self.eos_token_id, self.bos_token_id = (
            backend.token_to_id(named[name]) if name in named else None for name in ("eos_token", "bos_token")
        )

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """Token ids of a text. While a long one is read other threads go on."""
        if len(text) < LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of token ids; nothing is cleaned up."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @property
    def backend_tokenizer(self) -> "Tokenizer":
        """The tokenizer of `tokenizers`."""
        return self._backend

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The contents of bos_token and such, those that there are."""
        return dict(self._named)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id that no token has."""
        return self._backend.id_to_token(token_id)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, "AddedToken"]:
        """Tokens that are matched in the text before anything else, by id."""
        return self._backend.get_added_tokens_decoder()


def plain_tokenizer(path: Path) -> PlainTokenizer | None:
    """The tokenizer of a model directory, None where transformers might make another one of its files.

    Raises what `tokenizers` raises for a damaged file, and ConfigError for a chat template that cannot be read.
    """
    settings = _settings(path)
    template = template_in(path) or settings.get("chat_template")
    has_several = not isinstance(template, str | None) or (path / "additional_chat_templates").exists()
    if not is_generic(settings) or settings.keys() - _HARMLESS or has_several:
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_buffer((path / "tokenizer.json").read_bytes())  # a name need not be UTF-8
    added = {token.content: (index, token) for index, token in backend.get_added_tokens_decoder().items()}
    named = {name: settings[name] for name in NAMED_TOKENS if settings.get(name) is not None}
    listed = settings.get("added_tokens_decoder") or {}
    is_large = backend.get_vocab_size() > _MOST_TOKENS_NOT_LOOKED_AT
    if (is_large and _may_be_mistral(path)) or not isinstance(listed, dict) or backend.post_processor is None:
        return None
    if not all(_is_there(token, None, added) for token in named.values()):
        return None
    if not all(_is_there(token, index, added) for index, token in listed.items()):
        return None
    contents = {name: token if isinstance(token, str) else token["content"] for name, token in named.items()}
    return PlainTokenizer(backend, contents, template)


def template_in(folder: Path) -> str | None:
    """The chat template that lies in a folder, None where there is none."""
    file = folder / TEMPLATE_NAME
    if not file.is_file():
        return None
    if (size := file.stat().st_size) > MOST_TEMPLATE_BYTES:
        raise ConfigError(f"{file}: {size} bytes, a chat template has at most {MOST_TEMPLATE_BYTES}; take it away")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def is_generic(settings: Mapping[str, Any]) -> bool:
    """Whether the settings name no family's own class and no code."""
    return settings.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in settings


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; empty where tokenizer.json is not all there is."""
    if not (path / "tokenizer.json").is_file() or (path / "added_tokens.json").exists():
        return {}
    names = ("special_tokens_map.json", "tokenizer_config.json")
    found = [read_json(path / name) for name in names if (path / name).is_file()]
    clash = len(found) == 2 and any(found[1].get(key, value) != value for key, value in found[0].items())
    return {} if clash or not found else {key: value for values in found for key, value in values.items()}


def _is_there(token: object, index: str | None, added: Mapping[str, tuple[int, "AddedToken"]]) -> bool:
    """Whether tokenizer.json has a token of the settings already, with the same flags and, where given, id."""
    flags = token if isinstance(token, dict) else {"content": token, "special": True}
    known, found = added.get(flags.get("content"), (None, None))  # type: ignore[arg-type]  # None is in no file
    if found is None or (index is not None and str(known) != index):
        return False
    return all(getattr(found, flag) == bool(flags.get(flag, False)) for flag in _FLAGS)


def _may_be_mistral(path: Path) -> bool:
    config = path / "config.json"
    return not config.is_file() or "tral" in str(read_json(config).get("model_type", "tral"))
