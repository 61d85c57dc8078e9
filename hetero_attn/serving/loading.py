"""A model's engine and its tokenizer, loaded side by side with a bar that shows how far they are."""

from collections.abc import Callable
from concurrent.futures import Future, wait

from hetero_attn.checkpoints.sources import open_source
from hetero_attn.engine.build import build_engine
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.host_memory import expect_room, memory_named
from hetero_attn.planning.draft import settle_drafted
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.serving.progress import compile_note, loading_bar, prepare_note, requantised_note
from hetero_attn.serving.text.opening import open_beside, watch_opening
from hetero_attn.serving.text.tokenizer import Tokenizer


def refuse_early(options: LoadOptions) -> None:
    """Raise what planning raises, and what loading finds wrong with the files before it reads weights: for who is about
    to measure the machine first, whose rates change none of it."""
    drafted = settle_drafted(options)
    expect_room(*drafted.plans)
    planned = drafted.planned
    _check_weights(planned)
    if options.needs_text:
        opening = _open(planned, options)
        wait([opening])
        watch_opening(opening, planned.plan.model, True, lambda count: None)(0)


def _check_weights(planned: PlannedModel) -> None:
    with open_source(planned.path, planned.headers) as checkpoint:
        checkpoint.check(planned.model)


def _open(planned: PlannedModel, options: LoadOptions) -> Future[Tokenizer | None]:
    """The tokenizer of a planned model, which is being opened, and then asked what the options want of it."""

    def refuses(tokenizer: Tokenizer) -> None:
        if callable(options.needs_text):
            options.needs_text(tokenizer, planned)

    return open_beside(planned.tokenizer or planned.path, planned.headers, refuses)


def load_beside(planned: PlannedModel, options: LoadOptions) -> tuple[Future[Tokenizer | None], Engine]:
    """A model's tokenizer and its engine; raises what either raises. Where no text is needed, the tokenizer may still
    be opening."""
    shows, model = options.progress, planned.plan.model
    with memory_named(f"loading {model}"), loading_bar(planned.plan, shows) as bar:
        opening = _open(planned, options)
        needs_text = bool(options.needs_text)
        watched = watch_opening(opening, model, needs_text, bar.update, lambda: _check_weights(planned))
        watched(0)
        on_compile, on_prepare = (compile_note, prepare_note) if shows else (None, lambda name: None)
        engine = build_engine(
            planned, options.overlap, watched, on_compile, options.prefix_cache, options.handover, on_prepare
        )
        if shows:
            requantised_note(engine.weights.requantised)
        if options.needs_text:
            _await_opening(opening, watched, engine)
    return opening, engine


def _await_opening(opening: Future[Tokenizer | None], watched: Callable[[int], None], engine: Engine) -> None:
    """Raise what the opening raises, which may outlast a small model's weights; closes the engine then."""
    try:
        wait([opening])
        watched(0)
    except BaseException:
        engine.close()
        raise
