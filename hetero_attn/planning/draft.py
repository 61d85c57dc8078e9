"""A model and a small one that drafts for it, planned together: both share one budget of GPU memory, to the byte.

The draft model may have all the GPU memory that it can use, or a part of it, or next to none; the large model has the
rest. The share with which the two are fastest at their best width is taken.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.fitting import settle_or_suggest
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import PlannedModel, settle
from placement.cost.drafts import DraftRates, draft_rates, pass_s
from placement.plan.units import format_bytes
from placement.policy.fields import SPECULATIONS

WIDTHS = (2, 4, 8, 16)  # rows of a pass, few of them: each is a recorded pass of its own
SHARES = (1.0, 0.5, 0.25, 0.1)  # of the GPU memory that a draft model can use
STATES_REMEMBER = "the model has layers whose state cannot forget a wrong draft"
# How likely a draft is right, before any was tried: what the literature reports of small siblings, and of repeats in
# text and code (Spec-Bench, arXiv 2401.07851).
MODEL_ACCEPTANCE, NGRAM_ACCEPTANCE = 0.7, 0.4


@dataclass(frozen=True, slots=True)
class Drafted:
    """A planned model and what drafts for it. draft: None where no model does. rates: what widths give, None where
    nobody drafts."""

    planned: PlannedModel
    draft: PlannedModel | None = None
    rates: DraftRates | None = None

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
        right = f"{self.rates.acceptance:.0%} of drafts right (assumed)"
        return [f"drafts by {who}; {right}", *self.rates.lines()]

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
        return {"speculate": self.wish, "draft": draft, "step_share": self.step_share, **self.rates.to_dict()}


def settle_drafted(wishes: LoadOptions, alone: PlannedModel | None = None) -> Drafted:
    """Plan a model with what drafts for it, which `wishes.speculate` says, or their policy where they say nothing.

    alone: the model planned without, if it has been. Raises MemoryBudgetError where the budget does not hold both.
    """
    alone = alone or settle_or_suggest(wishes)
    drafted = Drafted(alone)
    if drafted.why_off:
        return drafted
    if drafted.wish in SPECULATIONS:
        return Drafted(alone, None, _rates(alone, None))
    own = _draft_wishes(wishes, drafted)
    if alone.device == "cpu":
        draft = settle(own, drafts=True)
        return Drafted(alone, draft, _rates(alone, draft))
    pairs = list(_pairs(wishes, own, alone.plan.gpu_memory_bytes))
    if not pairs:
        budget = format_bytes(alone.plan.gpu_memory_bytes)
        raise MemoryBudgetError(
            f"{budget} of GPU memory hold no plan of {alone.plan.model} beside the draft model {own.model}; raise "
            "gpu_memory, lower max_context, or leave speculate off"
        )
    return max(pairs, key=_tokens_per_s)


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
        max_context=context,
        max_batch=alone.plan.max_batch,
    )


def _pairs(wishes: LoadOptions, own: LoadOptions, budget_bytes: int) -> Iterator[Drafted]:
    """Plans of both for every share that leaves room for the large model."""
    try:
        usable = settle(replace(own, gpu_memory=budget_bytes), drafts=True).plan.memory.gpu_bytes
    except MemoryBudgetError:
        return
    for share in SHARES:
        given = round(share * usable)
        try:
            draft = settle(replace(own, gpu_memory=given), drafts=True)
            planned = settle(replace(wishes, gpu_memory=budget_bytes - given))
        except MemoryBudgetError:
            continue
        yield Drafted(planned, draft, _rates(planned, draft))


def _rates(planned: PlannedModel, draft: PlannedModel | None) -> DraftRates:
    acceptance = NGRAM_ACCEPTANCE if draft is None else MODEL_ACCEPTANCE
    step_s = 0.0 if draft is None else _step_s(draft)
    return draft_rates(planned.plan, planned.hardware, step_s, acceptance, WIDTHS)


def _tokens_per_s(drafted: Drafted) -> float:
    return 0.0 if drafted.rates is None else drafted.rates.best.tokens_per_s


def _step_s(draft: PlannedModel) -> float:
    return pass_s(draft.plan, draft.hardware, 1)
