"""The tokenizer of a tokenizer.json without transformers, whose import takes a second of every start.

Only where the file alone decides: the generic classes of transformers, and settings beside the file that say nothing
else. For the rest, and for chat templates, transformers is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.checkpoints.transformers_import import transformers_part
from hetero_attn.spec.json_fields import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

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

    backend: of the `tokenizers` package. named: the contents of bos_token and such. full: opens the same tokenizer in
    transformers, for what concerns chat templates.
    """

    def __init__(self, backend: "Tokenizer", named: Mapping[str, str], full: Callable[[], Any]) -> None:
        self._backend, self._open_full, self._named = backend, full, named
        backend.no_truncation()
        backend.no_padding()
        self.eos_token_id, self.bos_token_id = (
            backend.token_to_id(named[name]) if name in named else None for name in ("eos_token", "bos_token")
        )

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """Token ids of a text."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

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

    @cached_property
    def _full(self) -> Any:
        return self._open_full()

    @property
    def chat_template(self) -> str | None:
        """The template of conversations, as transformers finds it."""
        return self._full.chat_template

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """As transformers does it."""
        return self._full.apply_chat_template(messages, **options)


class GgufPlainTokenizer(PlainTokenizer):
    """That of a GGUF file, whose chat template is rendered by transformers without a second copy of the vocabulary."""

    def __init__(self, backend: "Tokenizer", named: Mapping[str, str], chat_template: str | None) -> None:
        super().__init__(backend, named, self._open_renderer)
        self._template = chat_template

    @property
    def chat_template(self) -> str | None:
        """The template of conversations."""
        return self._template

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Token ids of what the template makes of the messages."""
        text = self._full.apply_chat_template(messages, **options | {"tokenize": False})
        return self.encode(text, add_special_tokens=False)

    def _open_renderer(self) -> Any:
        """A tokenizer of transformers that has the template and the names of tokens, and no vocabulary."""
        from tokenizers import Tokenizer, models

        fast = transformers_part("PreTrainedTokenizerFast")
        return fast(tokenizer_object=Tokenizer(models.BPE()), chat_template=self._template, **self._named)


def plain_tokenizer(path: Path, full: Callable[[], Any]) -> PlainTokenizer | None:
    """The tokenizer of a model directory, None where transformers might make another one of its files.

    full: opens it in transformers. Raises what `tokenizers` raises for a damaged file.
    """
    settings = _settings(path)
    if not is_generic(settings) or settings.keys() - _HARMLESS:
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
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
    return PlainTokenizer(backend, contents, full)


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
