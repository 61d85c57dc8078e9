"""A model and a small one that drafts for it, planned together: both share one budget of GPU memory, to the byte.

The model is planned alone first. Then one search (placement.drafted) has the rows of its passes, where the drafter
lives and the cut to choose, by the seconds of the planner's reference requests; the column shape and the prefill chunk
are those of the model alone.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.fitting import settle_or_suggest
from hetero_attn.planning.guesses import guesses_of
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import Asked, PlannedModel, ask
from placement.cost.drafts import WORTH, DraftRates, draft_rates, pass_s
from placement.drafted.drafters import Drafter, drafters
from placement.drafted.search import plan_drafted
from placement.plan.drafting import Guesses
from placement.plan.units import format_bytes
from placement.policy.fields import SPECULATIONS

WIDTHS = (2, 4, 8, 16)  # rows of a pass, few of them: each is a recorded pass of its own
STATES_REMEMBER = "the model has layers whose state cannot forget a wrong draft"


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
        if self.wish == "off":
            return "speculate is off"
        return STATES_REMEMBER if self.wish == "auto" and self.planned.plan.workload.states else ""

    @property
    def step_share(self) -> float:
        """A step of the draft model over one of the large model."""
        return 0.0 if self.draft is None or self.rates is None else _step_s(self.draft) / self.rates.widths[0].pass_s

    @property
    def draft_gpu_bytes(self) -> int:
        """GPU memory of the budget that the draft model has."""
        return 0 if self.draft is None or self.draft.device == "cpu" else self.draft.plan.gpu_memory_bytes

    def lines(self) -> list[str]:
        """The same as lines of text, 80 columns wide at most; none where drafts are not wished for."""
        if self.rates is None:
            return [] if self.wish == "off" else [f"no drafts: {self.why_off}"]
        who = "n-grams of prompt and answer"
        if self.draft is not None:
            memory = self.draft.plan.memory
            where = f"{format_bytes(memory.gpu_bytes)} of GPU memory, {format_bytes(memory.host_bytes)} of DRAM"
            who = f"{self.draft.plan.model}, {where}, {1e3 * _step_s(self.draft):.2f} ms a step"
        alone = f"without drafts, with a plan of its own: {self.alone_tokens_per_s:.2f} tokens/s"
        if self.rates.best.rows > 1 and self.rates.best.tokens_per_s < WORTH * self.alone_tokens_per_s:
            alone += "; the drafter costs more than it brings"
        return [f"drafts by {who}", self.rates.guesses.line(), *self.rates.lines(), alone]

    def to_yaml(self) -> str:
        """The plan as a policy, with who drafts; the budget is that of both models."""
        text = self.planned.plan.to_yaml()
        if self.wish == "off":
            return text
        own = f"gpu_memory: {self.planned.plan.gpu_memory_bytes}\n"
        both = f"gpu_memory: {(self.planned.plan.gpu_memory_bytes or 0) + self.draft_gpu_bytes}\n"
        return f"{text.replace(own, both, 1)}speculate: {json.dumps(self.wish)}\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.rates is None:
            return {"speculate": self.wish, "why_off": self.why_off}
        draft = None if self.draft is None else self.draft.plan.to_dict()
        own = {"draft": draft, "step_share": self.step_share, "alone_tokens_per_s": self.alone_tokens_per_s}
        return {"speculate": self.wish, **own, **self.rates.to_dict()}


def settle_drafted(wishes: LoadOptions, alone: PlannedModel | None = None) -> Drafted:
    """Plan a model with what drafts for it, which `wishes.speculate` says, or their policy where they say nothing.

    alone: the model planned without, if it has been. Raises MemoryBudgetError where the budget does not hold both.
    """
    alone = alone or settle_or_suggest(wishes)
    drafted = Drafted(alone)
    if drafted.why_off:
        return drafted
    guesses = guesses_of(alone.path, drafted.wish)
    if drafted.wish in SPECULATIONS:
        return _together(alone, _like(ask(wishes), alone), None, guesses)
    own = _draft_wishes(wishes, drafted)
    return _together(alone, _like(ask(wishes), alone), ask(own, drafts=True), guesses)


def _like(asked: Asked, alone: PlannedModel) -> Asked:
    """The same, in the shape and with the prefill chunk of the model planned alone, which later plans keep."""
    request, plan = asked.request, alone.plan
    for choice in request.workload.chunk_choices:
        if choice.rows == plan.prefill_chunk:
            request = replace(request, workload=request.workload.with_chunk(choice))
    policy = request.policy.model_copy(update={"shape": plan.shape})
    request = replace(request, policy=policy)
    return replace(asked, request=request, workload=request.workload, policy=policy)


def _together(alone: PlannedModel, asked: Asked, own: Asked | None, guesses: Guesses) -> Drafted:
    """Both plans, of the one search. own: of the model that drafts."""
    budget_bytes = asked.request.limits["gpu"]
    places: list[Drafter | None] = [None] if own is None else [*drafters(own.request)]
    found = plan_drafted(asked.request, places, guesses, WIDTHS)
    if found is None:
        model = "n-grams" if own is None else f"the draft model {own.request.workload.model}"
        raise MemoryBudgetError(
            f"{format_bytes(budget_bytes or 0)} of GPU memory hold no plan of {asked.request.workload.model} beside "
            f"{model}; raise gpu_memory, lower max_context, or leave speculate off"
        )
    planned = asked.planned(found.plan)
    draft = None if own is None or found.drafter is None else own.planned(found.drafter.plan)
    step_s = 0.0 if draft is None else _step_s(draft)
    rates = draft_rates(planned.plan, planned.hardware, step_s, guesses, WIDTHS)
    return Drafted(planned, draft, rates, 1.0 / pass_s(alone.plan, alone.hardware, 1))


def _draft_wishes(wishes: LoadOptions, drafted: Drafted) -> LoadOptions:
    """The draft model serves the same sequences, on the same machine."""
    alone, model = drafted.planned, drafted.wish
    context = min(alone.plan.max_context, read_config(resolve_model(model, None)).max_position_embeddings)
    return LoadOptions(
        model=model,
        device=alone.device,
        hardware=wishes.hardware,
        num_threads=alone.plan.num_threads,
        page_size=wishes.page_size,
        gpu_memory=alone.plan.gpu_memory_bytes,
        max_context=context,
        max_batch=alone.plan.max_batch,
    )


def _step_s(draft: PlannedModel) -> float:
    return pass_s(draft.plan, draft.hardware, 1)
