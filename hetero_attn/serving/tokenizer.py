"""Text to token ids and back: a thin door to the tokenizer of transformers, and text as it streams.

Nothing from a model directory is executed: remote code is never trusted, and chat templates run only inside
transformers' sandbox. transformers is imported only where it is needed, because importing it takes a second: for files
that tokenizer.json alone does not decide (plain_tokenizer.py), and for chat templates.
"""

import importlib.util
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.tokenizer import gguf_tokenizer
from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.checkpoints.template_time import bounded_template
from hetero_attn.checkpoints.transformers_import import transformers_part
from hetero_attn.engine.host_memory import free_address_space
from hetero_attn.errors import ConfigError, MemoryBudgetError, PromptError
from hetero_attn.serving.plain_tokenizer import GgufPlainTokenizer, is_generic, plain_tokenizer
from hetero_attn.serving.prompts import as_messages, as_template_variables
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.spec.json_fields import read_json
from placement.plan.units import format_bytes

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
TEMPLATE_NAME, MOST_TEMPLATE_BYTES = "chat_template.jinja", 1 << 20
NO_TEXT = "answers have no text, only token ids"
LEAST_BYTES_TO_OPEN = 128 << 20  # of the tokenizers package, its threads' stacks and a large vocabulary
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so 3 may be waiting for the rest; a decoder shows up to one replacement for each.
_MAX_UNFINISHED = 3
# With more replacement characters than this at the end, the bytes are garbage rather than the start of a character
# (a byte-fallback vocabulary shows the whole run of bytes, so the character before counts too).
_GARBAGE_RUN = 8


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table): printable Latin-1 stands for
    itself, every other byte, in order, for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a model carries a tokenizer; without one, prompts must be token ids."""
    path = Path(path)
    if is_gguf(path):
        with GgufCheckpoint.open(path) as source:
            return "tokenizer.ggml.tokens" in source.fields.values
    return any((path / name).is_file() for name in _FILES)


class Tokenizer:
    """The tokenizer of a model directory. Made by `Tokenizer.open`.

    Attributes:
        eos_token_ids: ids that end a text, by the tokenizer alone; the model config may name more.
        bos_token_id: the id a text begins with, or None.
    """

    def __init__(self, path: Path, tokenizer: Any):
        self.path = path
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.bos_token_id: int | None = tokenizer.bos_token_id

    @classmethod
    def open(cls, path: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """Open the tokenizer of a local model: of a GGUF file that in its metadata, or a tokenizer.json beside it.

        Args:
            path: the directory or file. vocab_size: rows of the model's embedding, checked against the tokenizer's ids.

        Raises:
            ConfigError: there is no tokenizer, it cannot be read or it needs remote code.

        Warns of ids that the model has no embedding for; fewer ids than rows are fine, embeddings are often padded.
        """
        path = Path(path)
        if is_gguf(path) and not (path.parent / "tokenizer.json").is_file():
            with GgufCheckpoint.open(path) as source:
                found = gguf_tokenizer(source.fields)
            template = _template_beside(path) or found.chat_template
            opened = cls(path, GgufPlainTokenizer(found.backend, found.named, template))
        else:
            opened = cls._from_files(path.parent if is_gguf(path) else path)
        if vocab_size is not None:
            opened.compare_vocab(vocab_size)
        return opened

    @classmethod
    def _from_files(cls, path: Path) -> "Tokenizer":
        if not has_tokenizer(path):
            raise ConfigError(
                f"{path}: no tokenizer found ({', '.join(_FILES)}); download its files or give prompts as token ids"
            )
        _check_address_space(path)
        try:
            tokenizer = plain_tokenizer(path, lambda: _loaded(path)) or _loaded(path)
        # Damaged files surface as nearly any exception type of transformers, tokenizers or sentencepiece.
        except Exception as error:
            raise ConfigError(
                f"{path}: the tokenizer cannot be loaded: {_first_line(error)}; {_way_out(path)}"
            ) from error
        return cls(path, tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model's texts begin (and end) with unless told not to.

        Raises:
            PromptError: the text cannot be encoded, for instance because it holds half of a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt is not valid Unicode: {_first_line(error)}; give text without surrogates"
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, None where it has none."""
        return self._tokenizer.chat_template or None

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
            raise PromptError(
                f"{self.path}: the tokenizer has no chat template, as those of base models have none; use generate "
                f"with a plain prompt, or put the model's {TEMPLATE_NAME} into its folder"
            )
        try:
            with bounded_template():
                ids = self._tokenizer.apply_chat_template(
                    plain,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tokenize=True,
                    return_dict=False,
                    **variables,
                )
        # A template raises what it likes: jinja2 errors, its own raise_exception, type errors from odd content.
        except Exception as error:
            raise PromptError(f"{self.path}: the chat template refuses these messages: {_first_line(error)}") from error
        return list(ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character come out as U+FFFD."""
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

    def stream(self, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> "TextStream":
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

    def compare_vocab(self, vocab_size: int) -> None:
        """Warn about a token that the model has no embedding for."""
        token, token_id = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id >= vocab_size:
            warnings.warn(
                f"{self.path}: the tokenizer's token {token!r:.60} has id {token_id}, but the model has embeddings for "
                f"{vocab_size}; a prompt that holds such a token is refused",
                stacklevel=3,
            )


class TextStream:
    """Token ids in, text out as soon as it is certain: never half a character, never part of a stop string.

    Tokens are decoded in a window that starts one piece before what is not yet shown, because a decoder may treat the
    first token of a text specially (sentencepiece drops its leading space). The joined pieces equal the text of all
    tokens, up to the stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        """`decode` turns token ids into text; `stop` are the strings that end it."""
        self._decode = decode
        self._matcher = StopMatcher(stop)
        self._window: list[int] = []
        self._shown_tokens = 0  # tokens at the front of the window whose text is shown in full
        self._shown_chars = 0  # characters of the window's text that are shown

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def copy(self) -> "TextStream":
        """One that goes on from here by itself."""
        twin = copy(self)
        twin._matcher = copy(self._matcher)
        return twin

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one token; returns (text that became certain, whether a stop string ended it)."""
        self._window = [*self._window, token_id]
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        if unfinished > _GARBAGE_RUN:
            unfinished = _MAX_UNFINISHED
        piece = self._show(text, len(text) - unfinished)
        if not unfinished:
            self._slide()
        return self._matcher.push(piece), self._matcher.matched is not None

    def finish(self) -> str:
        """The text still held back, when no more tokens come; half a character comes out as U+FFFD."""
        text = self._decode(self._window)
        return self._matcher.push(self._show(text, len(text))) + self._matcher.finish()

    def _show(self, text: str, end: int) -> str:
        piece = text[self._shown_chars : end]
        self._shown_chars = max(self._shown_chars, end)
        return piece

    def _slide(self) -> None:
        """Let the window begin at the newest piece, unless that is empty and would not show how a text begins."""
        newest = self._window[self._shown_tokens :]
        if newest_text := self._decode(newest):
            self._window, self._shown_chars = newest, len(newest_text)
        self._shown_tokens = len(self._window)


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one.

    Attributes:
        matched: the stop string that ended the text, or None.
    """

    def __init__(self, stop: Sequence[str]):
        self.matched: str | None = None
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def push(self, text: str) -> str:
        """Take a piece; returns what is certain not to belong to a stop string. Nothing after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(position, stop) for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            position, self.matched = min(found)
            self._held = ""
            return text[:position]
        certain = len(text) - self._overlap(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _way_out(path: Path) -> str:
    """What helps against a tokenizer that cannot be opened."""
    only_sentencepiece = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
    if only_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        return "tokenizer.model needs the sentencepiece package: pip install sentencepiece protobuf"
    return (
        "download the tokenizer files again (code that comes with a model is never run), or give prompts as token ids"
    )


def open_beside(path: Path) -> Future[Tokenizer | None]:
    """Open a model's tokenizer on a thread of its own, because importing transformers, where it needs that, takes a
    second that loading weights takes too; the result is None for a model without one, and raises what `Tokenizer.open`
    raises."""
    opened: Future[Tokenizer | None] = Future()

    def work() -> None:
        try:
            opened.set_result(Tokenizer.open(path) if has_tokenizer(path) else None)
        except BaseException as error:
            opened.set_exception(error)

    Thread(target=work, name="hetero-attn-tokenizer").start()
    return opened


def watch_opening(
    opening: Future[Tokenizer | None], model: str, needs_text: bool, progress: Callable[[int], None]
) -> Callable[[int], None]:
    """`progress` that also looks, at each call, whether a tokenizer that is being opened has failed.

    With needs_text that ends the work under way: raises PromptError for a model without a tokenizer, else what
    `Tokenizer.open` raised. Without, it warns once.
    """
    is_settled = False

    def watched(count: int) -> None:
        nonlocal is_settled
        if not is_settled and opening.done():
            is_settled, failure = True, opening.exception()
            if needs_text and failure is not None:
                raise failure
            if needs_text and opening.result() is None:
                raise PromptError(f"{model} has no tokenizer files; give prompts as lists of token ids")
            if isinstance(failure, ConfigError):
                warnings.warn(f"{NO_TEXT}: {failure}", stacklevel=4)
        progress(count)

    return watched


def import_beside() -> None:
    """Begin to import transformers on a thread of its own: whoever will need a chat template has it sooner."""
    Thread(target=transformers_part, args=("PreTrainedTokenizerFast",), name="hetero-attn-transformers").start()


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


def _template_beside(path: Path) -> str | None:
    """The chat template that lies beside a GGUF file, None where there is none."""
    file = path.parent / TEMPLATE_NAME
    if not file.is_file():
        return None
    if (size := file.stat().st_size) > MOST_TEMPLATE_BYTES:
        raise ConfigError(f"{file}: {size} bytes, a chat template has at most {MOST_TEMPLATE_BYTES}; take it away")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
