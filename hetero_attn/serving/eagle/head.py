"""An EAGLE-3 head as drafter: a chain of its greedy tokens (arXiv 2503.01840; see `spec.draft_heads.eagle_config`).

A row of the head stands at the place of a token of the text. It is made of the hidden states that the large model had
there and of the token behind, and gives the one behind that. Behind the last token that the large model has computed
the head's own hidden state takes their place, and its guess that of the token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.greatest import greatest
from hetero_attn.errors import CheckpointError
from hetero_attn.ops.step_rows import Rows
from hetero_attn.serving.eagle.drafter import EagleDrafter, pairs
from hetero_attn.spec.config import ModelConfig, tensor_names
from hetero_attn.speculation.drafter import passes
from hetero_attn.speculation.speculator import Asked


class EagleHead:
    """An engine of a head, which drafts for any number of requests in the same passes.

    token_ids: of the large model, for each of the head's own vocabulary. step_share: what one of its steps is expected
    to take, over a step of the model that it drafts for. reads: it is shown what that model computes.
    """

    reads = True

    def __init__(self, engine: Engine, token_ids: Sequence[int], step_share: float) -> None:
        self.engine = engine
        self.step_share = step_share
        self._token_ids = token_ids

    def drafter(self) -> EagleDrafter:
        """A drafter for one request."""
        return EagleDrafter(self.engine)

    def reusable(self, token_ids: Sequence[int], stored: int) -> int:
        """How much of a text, of which `stored` tokens are known to the large model, it does not compute again: all, or
        a page less where the head knows that much, and could not go on otherwise."""
        own = self.engine.kv_cache.stored(pairs(token_ids))
        return own if stored - self.engine.plan.page_size <= own < stored else stored

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What each request's drafter guesses."""
        going = [each.drafter for each in asked if each.drafter.begin(*each[1:])]
        while going:
            for group in passes(going, self.engine.most_single_rows):
                self._guess(group)
            going = [drafter for drafter in going if drafter.is_going]
        return [each.drafter.drafted for each in asked]

    def close(self) -> None:
        """Release its threads and memory; idempotent."""
        self.engine.close()

    def _guess(self, drafters: Sequence[EagleDrafter]) -> None:
        """One pass; of drafters that all begin, or all go on."""
        counts = [len(drafter.pending) for drafter in drafters]
        beside = torch.cat([drafter.beside for drafter in drafters])
        hidden = beside if drafters[0].drafted else self.engine.fused(beside)
        parts = zip(drafters, hidden.split(counts), strict=True)
        work = [Rows(drafter.sequence, drafter.pending, hidden=part) for drafter, part in parts]
        logits = self.engine.run(work, copy=False)
        handed_on = self.engine.handed_on(sum(counts)).split(counts)
        for drafter, own, after in zip(drafters, logits, handed_on, strict=True):
            drafter.take(self._token_ids[greatest(own[-1])], after[-1:])


def read_token_ids(path: Path, config: ModelConfig) -> list[int]:
    """The large model's id of every token of a head's vocabulary; raises CheckpointError for a table that is missing,
    too short, or beyond the large model's vocabulary."""
    count = config.eagle.draft_vocab_size
    with Checkpoint.open(path, tensor_names(path)) as source:
        if "d2t" not in source:
            if count == config.vocab_size:
                return list(range(count))
            raise CheckpointError(
                f"{path}: draft_vocab_size is {count} of {config.vocab_size}, and no tensor d2t says which tokens "
                "those are; download the head again"
            )
        offsets = source.read_integers("d2t")
    token_ids = [place + offset for place, offset in enumerate(offsets)]
    wrong = [token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size]
    if len(token_ids) != count or wrong:
        found = f"names token {wrong[0]} of {config.vocab_size}" if wrong else f"has {len(token_ids)} numbers"
        raise CheckpointError(f"{path}: d2t {found}, expected {count} tokens of the large model; download it again")
    return token_ids
