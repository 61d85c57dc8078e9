"""Text to token ids and back: a thin door to the tokenizer of transformers.

Nothing from a model directory is executed: remote code is never trusted, and chat templates run only in a sandbox that
bounds their time and what they build.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.checkpoints.template_time import bounded_template
from hetero_attn.errors import ConfigError, PromptError
from hetero_attn.serving.prompts import RESERVED, as_messages, as_template_variables
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.text.files import tokenizer_of_folder, tokenizer_of_gguf
from hetero_attn.serving.text.foreign import failures_told, first_line
from hetero_attn.serving.text.plain_tokenizer import TEMPLATE_NAME
from hetero_attn.serving.text.text_stream import TextStream


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table): printable Latin-1 stands for
    itself, every other byte, in order, for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()

# Where the method is that renders templates as we do; a class with another one knows better.
BASE_OF_TRANSFORMERS = "transformers.tokenization_utils_base"


class Tokenizer:
    """The tokenizer of a model directory. Made by `Tokenizer.open`.

    Attributes:
        eos_token_ids: ids that end a text, by the tokenizer alone; the model config may name more.
        bos_token_id: the id a text begins with, or None.
    """

    def __init__(self, path: Path, tokenizer: Any):
        self.path = path
        self._tokenizer = tokenizer
        self._templates: dict[str, Any] = {}
        eos = tokenizer.eos_token_id
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.bos_token_id: int | None = tokenizer.bos_token_id

    @classmethod
    def open(cls, path: str | Path, vocab_size: int | None = None, known: KnownHeaders | None = None) -> "Tokenizer":
        """Open the tokenizer of a local model: of a GGUF file that in its metadata, or a tokenizer.json beside it.

        Args:
            path: the directory or file. vocab_size: rows of the model's embedding, checked against the tokenizer's ids.
            known: as for `open_beside`.

        Raises:
            ConfigError: there is no tokenizer, it cannot be read or it needs remote code.

        Warns of ids that the model has no embedding for; fewer ids than rows are fine, embeddings are often padded.
        """
        path = Path(path)
        if is_gguf(path) and not (path.parent / "tokenizer.json").is_file():
            opened = cls(path, tokenizer_of_gguf(path, known))
        else:
            folder = path.parent if is_gguf(path) else path
            opened = cls(folder, tokenizer_of_folder(folder))
        if vocab_size is not None:
            opened.compare_vocab(vocab_size)
        return opened

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model's texts begin (and end) with unless told not to.

        Raises:
            PromptError: the text cannot be encoded, for instance because it holds half of a surrogate pair, or because
                the tokenizer's patterns give it up.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt is not valid Unicode: {first_line(error)}; give text without surrogates"
            ) from None
        with failures_told(self._cannot_read):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, None where it has none."""
        return self._tokenizer.chat_template or None

    @property
    def template_variables(self) -> set[str]:
        """Names that the chat template reads and a caller may set, such as enable_thinking; none where it is damaged.

        That a template has another one for tools counts: what either reads may be set.
        """
        from hetero_attn.serving.text.chat_template import variables_of  # imports jinja2

        found = self._tokenizer.chat_template or ""
        sources = [found] if isinstance(found, str) else list(found.values())
        with suppress(Exception):  # what jinja2 makes of a stranger's file; rendering says what is wrong
            return set().union(*map(variables_of, sources)) - RESERVED
        return set()

    @property
    def response_template(self) -> Any:
        """What the model's files say of how its answers are written, as transformers reads it; mostly None."""
        return getattr(self._tokenizer, "response_template", None)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation through the model's own chat template.

        Args:
            messages: each with "role" and "content", text or a list of text parts, which are joined.
            add_generation_prompt: end with the words that open the assistant's turn.
            template_variables: what the template knows beside the messages, such as {"enable_thinking": False}.
            continue_final_message: leave the last message open, so that the answer goes on with it.

        Raises:
            PromptError: no messages, a message without role or text, no template, or one that refuses them.
        """
        plain, variables = as_messages(messages), as_template_variables(template_variables)
        if not self._tokenizer.chat_template:
            raise no_template(self.path)
        ends = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        # A template raises what it likes: jinja2 errors, its own raise_exception, type errors from odd content.
        with failures_told(self._refuses), bounded_template():
            return list(self._ids_of_chat(plain, ends | variables))

    def _ids_of_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Sequence[int]:
        """Token ids of a conversation by our own renderer, unless the tokenizer's class has a way of its own."""
        from hetero_attn.serving.text.chat_template import ChatTemplate  # imports jinja2

        tokenizer = self._tokenizer
        renders = getattr(type(tokenizer), "apply_chat_template", None)
        if renders is not None and renders.__module__ != BASE_OF_TRANSFORMERS:
            return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        source = tokenizer.chat_template
        if not isinstance(source, str):
            source = tokenizer.get_chat_template(None, options.get("tools"))
        template = self._templates.setdefault(source, ChatTemplate(source))
        text = template.render(messages, **dict(tokenizer.special_tokens_map) | options)
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character come out as U+FFFD. Raises ConfigError where the tokenizer
        fails at them."""
        with failures_told(self._cannot_write):
            return self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; those of a special token are its name."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    @property
    def description(self) -> str | None:
        """What tokenizer.json says of it, None for one of another kind."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else backend.to_str()

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by their part, such as {"eos_token": "</s>"}."""
        named = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items() if name in named}

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that are left out of a text."""
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(token_id for token_id, token in added if token.special)

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in str(backend.decoder)

    def stream(self, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> TextStream:
        """A fresh `TextStream` over this tokenizer."""
        return TextStream(lambda token_ids: self.decode(token_ids, skip_special_tokens), stop)

    def with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """The parameters with special tokens among the stop strings as stop ids too: their text is left out of the
        answer, so the strings alone could never match."""
        if not params.stop:
            return params
        added = self._tokenizer.added_tokens_decoder.items()
        special = {token.content: token_id for token_id, token in added if token.special}
        ids = {special[text] for text in params.stop if text in special} - set(params.stop_token_ids)
        return replace(params, stop_token_ids=(*params.stop_token_ids, *sorted(ids))) if ids else params

    def _cannot_read(self, why: str) -> PromptError:
        return PromptError(f"{self.path}: the tokenizer cannot read this text: {why}; give other text, or token ids")

    def _cannot_write(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: the tokenizer cannot write these tokens: {why}; download its files again")

    def _refuses(self, why: str) -> PromptError:
        return PromptError(f"{self.path}: the chat template refuses these messages: {why}")

    def compare_vocab(self, vocab_size: int) -> None:
        """Warn about a token that the model has no embedding for."""
        token, token_id = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id >= vocab_size:
            warnings.warn(
                f"{self.path}: the tokenizer's token {token!r:.60} has id {token_id}, but the model has embeddings for "
                f"{vocab_size}; a prompt that holds such a token is refused",
                stacklevel=3,
            )


def no_template(path: Path) -> PromptError:
    """The error of a conversation with a model that has no chat template."""
    return PromptError(
        f"{path}: the tokenizer has no chat template, as those of base models have none; use generate with a plain "
        f"prompt, or put the model's {TEMPLATE_NAME} into its folder"
    )
