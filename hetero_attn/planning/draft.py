"""A model and a small one that drafts for it, planned together: both share one budget of GPU memory, to the byte.

The model is planned alone first. Then one search (placement.drafted) has the rows of its passes, where the drafter
lives and the cut to choose, by the seconds of the planner's reference requests; the column shape and the prefill chunk
are those of the model alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.planning.draft_budgets import in_smaller_chunks, pairs_that_fit, plan_in_the_rest, too_small
from hetero_attn.planning.draft_checks import (
    NAMED,
    named_as_drafter,
    other_vocabulary,
    sizes_differ,
)
from hetero_attn.planning.fitting import settle_or_suggest
from hetero_attn.planning.guesses import guesses_of
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import Asked, PlannedModel, ask
from placement.cost.drafts import WORTH, DraftRates, draft_rates, pass_s
from placement.drafted.drafters import Drafter, drafters
from placement.drafted.search import plan_drafted
from placement.plan.plan import Plan
from placement.plan.units import format_bytes
from placement.policy.fields import SPECULATIONS
from placement.policy.policy import Policy
from placement.solve.make_plan import plan_requested
from placement.solve.refusals import BudgetError

NGRAMS = "n-grams of prompt and answer"  # what drafts where no model does
WIDTHS = (2, 4, 8, 16)  # rows of a pass, few of them: each is a recorded pass of its own
MOST_PADDING = 1024  # rows of an embedding that stand for no token: models of one vocabulary are padded differently


@dataclass(frozen=True, slots=True)
class Drafted:
    """A planned model and what drafts for it. draft: None where no model does. rates: what widths give, None where
    nobody drafts. alone_tokens_per_s: what the model gives without, with all the memory and a plan for itself."""

    planned: PlannedModel
    draft: PlannedModel | None = None
    rates: DraftRates | None = None
    alone_tokens_per_s: float = 0.0

    @property
    def wish(self) -> str:
        """Who is to draft: the option, else the policy's key."""
        return self.planned.policy.speculate

    @property
    def why_off(self) -> str:
        """Why nobody drafts; empty where somebody does."""
        return "speculate is off" if self.wish == "off" else ""

    @property
    def step_share(self) -> float:
        """A step of the draft model over one of the large model."""
        return 0.0 if self.draft is None or self.rates is None else _step_s(self.draft) / self.rates.widths[0].pass_s

    @property
    def plans(self) -> list[Plan]:
        """Of what is loaded: the model's, and that of the one that drafts."""
        return [each.plan for each in (self.planned, self.draft) if each is not None]

    def lines(self) -> list[str]:
        """The same as lines of text, 80 columns wide at most; none where drafts are not wished for."""
        if self.rates is None:
            return [] if self.wish == "off" else [f"no drafts: {self.why_off}"]
        who = NGRAMS
        if self.draft is not None:
            memory = self.draft.plan.memory
            dram = format_bytes(memory.host_bytes + memory.pinned_bytes)
            where = f"{format_bytes(memory.gpu_bytes)} of GPU memory, {dram} of DRAM"
            who = f"{self.draft.plan.model}, {where}, {1e3 * _step_s(self.draft):.2f} ms a step"
        alone = f"without drafts, with a plan of its own: {self.alone_tokens_per_s:.2f} tokens/s"
        best = self.rates.best
        if (best.rows > 1 or self.draft is not None) and best.tokens_per_s < WORTH * self.alone_tokens_per_s:
            alone += "; the drafter costs more than it brings"
        return [f"drafts by {who}", self.rates.guesses.line(), *self.rates.lines(), alone]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.rates is None:
            return {"speculate": self.wish, "why_off": self.why_off}
        draft = None if self.draft is None else self.draft.plan.to_dict()
        own = {"draft": draft, "step_share": self.step_share, "alone_tokens_per_s": self.alone_tokens_per_s}
        return {"speculate": self.wish, **own, **self.rates.to_dict()}


def settle_drafted(
    wishes: LoadOptions, settle_alone: Callable[[LoadOptions, Asked], PlannedModel] = settle_or_suggest
) -> Drafted:
    """Plan a model with what drafts for it, which `wishes.speculate` says, or their policy where they say nothing.

    settle_alone: plans a model for which no other drafts. Raises MemoryBudgetError, with the smallest budget that
    works, where the budgets do not hold both, and UnsupportedModelError for who cannot draft for the model.
    """
    asked = ask(wishes)
    wish = asked.policy.speculate
    if wish in SPECULATIONS:
        drafted = Drafted(settle_alone(wishes, asked))
        return drafted if drafted.why_off else _together(asked, None, drafted.planned)
    with named_as_drafter(wish):
        own_wishes = _draft_wishes(wishes, asked)
        own = ask(own_wishes, drafts=True, known=asked.model.headers)
    _refuse_stranger(own, asked)
    if found := _both(asked, own):
        return found
    larges, smalls = in_smaller_chunks(wishes, asked), in_smaller_chunks(own_wishes, own, drafts=True)
    for large, small in pairs_that_fit(larges, smalls):
        if found := _both(large, small):
            return found
    raise too_small(larges[-1], smalls[-1])


def _both(asked: Asked, own: Asked) -> Drafted | None:
    """A model and the one that drafts for it; None where the budgets do not hold both."""
    try:
        return _together(asked, own, asked.planned(plan_requested(asked.request)))
    except BudgetError:
        return None


def _refuse_stranger(own: Asked, asked: Asked) -> None:
    """Raise UnsupportedModelError for a draft model of another vocabulary, by its size, or with states. A head was
    compared when the model was asked for; the tokens themselves are when both models are loaded."""
    sizes = own.model.config.vocab_size, asked.model.config.vocab_size
    if own.model.config.eagle is None and abs(sizes[0] - sizes[1]) > MOST_PADDING:
        raise other_vocabulary(own.workload.model, asked.workload.model, sizes_differ(*sizes))
    if own.workload.states:
        raise UnsupportedModelError(
            f"{NAMED} {own.workload.model}, which has layers whose state cannot forget several steps of wrong drafts; "
            "give a model of attention layers"
        )


def _together(asked: Asked, own: Asked | None, alone: PlannedModel) -> Drafted:
    """Both plans, of the one search. own: of the model that drafts. alone: the model planned without. Raises
    BudgetError for a budget that holds the model alone at most."""
    guesses = guesses_of(alone.path, asked.policy.speculate)
    places: list[Drafter | None] = [None] if own is None else [*drafters(own.request)]
    like = _like(asked, alone.plan)
    found = plan_drafted(like.request, places, guesses, WIDTHS)
    if found is None and own is not None:  # shape and chunk of the model alone may take what the drafter needs
        like = _like(asked, plan_in_the_rest(asked, own))
        found = plan_drafted(like.request, places, guesses, WIDTHS)
    if found is None:
        raise BudgetError(f"the memory budgets hold no plan of {asked.workload.model} with drafts", 0, 0)
    planned = like.planned(found.plan)
    draft = None if own is None or found.drafter is None else own.planned(found.drafter.plan)
    step_s = 0.0 if draft is None else _step_s(draft)
    rates = draft_rates(planned.plan, planned.hardware, step_s, guesses, WIDTHS)
    return Drafted(planned, draft, rates, 1.0 / pass_s(alone.plan, alone.hardware, 1))


def _like(asked: Asked, alone: Plan) -> Asked:
    """The same, in the shape and with the prefill chunk of the model planned alone, which later plans keep."""
    request = asked.request
    for choice in (*request.workload.chunk_choices, *request.workload.smaller_chunks):
        if choice.rows == alone.prefill_chunk:
            request = replace(request, workload=request.workload.with_chunk(choice))
    policy = request.policy.model_copy(update={"shape": alone.shape})
    request = replace(request, policy=policy)
    return replace(asked, request=request, workload=request.workload, policy=policy)


def _draft_wishes(wishes: LoadOptions, asked: Asked) -> LoadOptions:
    """The draft model serves the same sequences, on the same machine, within the same budgets."""
    model, policy = asked.policy.speculate, asked.policy
    longest = read_config(resolve_model(model, None), asked.model.headers).max_position_embeddings
    return LoadOptions(
        model=model,
        policy=Policy(pinned_memory=policy.pinned_memory, host_memory=policy.host_memory),
        device=asked.device,
        hardware=wishes.hardware,
        num_threads=asked.request.hardware.cores,
        page_size=wishes.page_size,
        gpu_memory=asked.request.gpu_memory_bytes,
        max_context=min(asked.workload.max_context, longest),
        max_batch=asked.workload.max_batch,
    )


def _step_s(draft: PlannedModel) -> float:
    return pass_s(draft.plan, draft.hardware, 1)
