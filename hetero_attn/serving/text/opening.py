"""Work beside the loading of weights: opening a model's tokenizer."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.errors import ConfigError, MissingTokenizerError
from hetero_attn.serving.text.files import has_tokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer

NO_TEXT = "answers have no text, only token ids"


def open_beside(
    path: Path, known: KnownHeaders | None = None, refuses: Callable[[Tokenizer], object] = lambda tokenizer: None
) -> Future[Tokenizer | None]:
    """Open a model's tokenizer on a thread of its own, because importing transformers, where it needs that, takes a
    second that loading weights takes too; the result is None for a model without one, and raises what `Tokenizer.open`
    raises. known: GGUF headers that this start has read. refuses: raises for what this tokenizer cannot do."""
    opened: Future[Tokenizer | None] = Future()

    def work() -> None:
        try:
            tokenizer = Tokenizer.open(path, known=known) if has_tokenizer(path, known) else None
            if tokenizer is not None:
                refuses(tokenizer)
            opened.set_result(tokenizer)
        except BaseException as error:
            opened.set_exception(error)

    Thread(target=work, name="hetero-attn-tokenizer").start()
    return opened


def watch_opening(
    opening: Future[Tokenizer | None],
    model: str,
    needs_text: bool,
    progress: Callable[[int], None],
    check_weights: Callable[[], object] = lambda: None,
) -> Callable[[int], None]:
    """`progress` that also looks, at each call, whether a tokenizer that is being opened has failed.

    With needs_text that ends the work under way: raises MissingTokenizerError for a model without a tokenizer, else
    what `Tokenizer.open` raised. Without, it warns once. check_weights: raises for a model that lacks more than its
    tokenizer, which is then said instead.
    """
    is_settled = False

    def watched(count: int) -> None:
        nonlocal is_settled
        if not is_settled and opening.done():
            is_settled, failure = True, opening.exception()
            if needs_text and failure is not None:
                raise failure
            if needs_text and opening.result() is None:
                check_weights()
                raise MissingTokenizerError(model)
            if isinstance(failure, ConfigError):
                warnings.warn(f"{NO_TEXT}: {failure}", stacklevel=4)
        progress(count)

    return watched
