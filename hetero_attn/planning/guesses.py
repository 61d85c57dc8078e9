"""How good a drafter's guesses are taken to be: as a benchmark of the model found them, else as others report them."""

from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.planning.kept import keep, kept
from placement.plan.drafting import Guesses
from placement.policy.fields import SPECULATIONS

GUESSES, NGRAMS = "guesses", "ngram"
# Before any was tried: small siblings as the literature reports them; repeats as answers of the shipped and of a public
# checkpoint had them, with a match in 0.2 to 0.6 of the passes and 0.6 to 0.8 of the drafts behind one right.
# Spec-Bench (arXiv 2401.07851) has about as many tokens a pass.
MODEL_GUESSES, NGRAM_GUESSES = Guesses(0.7), Guesses(0.7, share=0.4)


def guesses_of(model: Path, wish: str) -> Guesses:
    """Those of a drafter for a model. wish: ngram, auto, or another model."""
    found = kept(GUESSES, model).get(_name(wish))
    acceptance, share = (found.get(name) if isinstance(found, dict) else None for name in ("acceptance", "share"))
    if all(type(value) is float and 0 < value <= 1 for value in (acceptance, share)):
        return Guesses(acceptance, share, is_measured=True)
    return NGRAM_GUESSES if wish in SPECULATIONS else MODEL_GUESSES


def keep_guesses(model: Path, found: dict[str, Guesses]) -> None:
    """Keep what was measured, by who drafted, beside what is kept of others; warns where that is not possible."""
    new: dict[str, Any] = {_name(wish): {"acceptance": g.acceptance, "share": g.share} for wish, g in found.items()}
    if new:
        keep(GUESSES, model, kept(GUESSES, model) | new, "how often drafts were right is")


def _name(wish: str) -> str:
    return NGRAMS if wish in SPECULATIONS else str(resolve_model(wish, None).resolve())
