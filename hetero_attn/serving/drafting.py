"""Load the model that drafts beside the one that answers, once it is certain that both mean the same by a token."""

import warnings
from concurrent.futures import Future

from hetero_attn.engine.build import build_beside
from hetero_attn.engine.engine import Engine
from hetero_attn.planning.draft import NGRAMS, Drafted
from hetero_attn.planning.draft_checks import named_as_drafter, other_vocabulary, sizes_differ
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.serving.draft_model import DraftModel
from hetero_attn.serving.eagle.head import EagleHead, read_token_ids
from hetero_attn.serving.progress import drafter_note, prepare_note
from hetero_attn.serving.text.files import has_tokenizer
from hetero_attn.serving.text.tokenizer import Tokenizer
from hetero_attn.speculation.speculator import DraftingModel, Speculator, make_speculator
from placement import Plan

SAMPLED_TOKENS = 2000


def load_speculator(
    engine: Engine, options: LoadOptions, drafted: Drafted, opening: Future[Tokenizer | None]
) -> Speculator | None:
    """Who drafts for a model that is loaded, None for nobody; what fails closes its engine.

    opening: the model's tokenizer. Raises UnsupportedModelError for a draft model of another vocabulary.
    """
    try:
        model = None
        if drafted.draft is not None:
            with named_as_drafter(drafted.wish):
                model = _load_draft_model(drafted, engine, options, opening)
        speculator = make_speculator(drafted.wish, engine.report, model)
        if speculator is not None and options.progress:
            drafter_note(NGRAMS if drafted.draft is None else drafted.draft.plan.model)
        return speculator
    except BaseException:
        engine.close()
        raise


def _load_draft_model(
    drafted: Drafted, engine: Engine, options: LoadOptions, opening: Future[Tokenizer | None]
) -> DraftingModel:
    """The draft model, on the threads of `engine`."""
    draft = drafted.draft
    assert draft is not None
    if draft.config.eagle is not None:
        return _load_head(drafted, draft, engine, options)
    expect_same_tokens(drafted.planned, draft, opening)
    _warn_of_short_context(draft.plan, engine.plan)
    own = build_beside(draft, engine, prepare_note if options.progress else lambda name: None)
    return DraftModel(own, engine.config.vocab_size, drafted.step_share)


def _warn_of_short_context(small: Plan, large: Plan) -> None:
    """Say where drafts will end before a text does."""
    if small.max_context < large.max_context:
        warnings.warn(
            f"{small.model} drafts for the first {small.max_context} tokens of a text, its own context; that of "
            f"{large.model} is {large.max_context}, and what is longer is answered without drafts",
            stacklevel=5,
        )


def _load_head(drafted: Drafted, head: PlannedModel, engine: Engine, options: LoadOptions) -> EagleHead:
    """A head, whose sizes planning has compared with the model's."""
    token_ids = read_token_ids(head.path, head.config)
    own = build_beside(head, engine, prepare_note if options.progress else lambda name: None)
    return EagleHead(own, token_ids, drafted.step_share)


def expect_same_tokens(large: PlannedModel, small: PlannedModel, opening: Future[Tokenizer | None]) -> None:
    """Raise UnsupportedModelError where two models write text in other tokens; embeddings may be padded.

    Without a tokenizer on either side the sizes of the vocabularies decide.
    """
    names = small.plan.model, large.plan.model
    sizes = small.config.vocab_size, large.config.vocab_size
    own = Tokenizer.open(small.path, known=small.headers) if has_tokenizer(small.path, small.headers) else None
    other = opening.result() if opening.exception() is None else None
    if own is None or other is None:
        if sizes[0] != sizes[1]:
            raise other_vocabulary(*names, sizes_differ(*sizes))
        return
    for token_id in range(0, min(sizes), max(1, min(sizes) // SAMPLED_TOKENS)):
        mine, its = other.token_bytes(token_id), own.token_bytes(token_id)
        if mine != its:
            raise other_vocabulary(*names, f"token {token_id} is {its!r:.40} there and {mine!r:.40} here")
