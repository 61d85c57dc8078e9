"""A token drawn before it is known what a grammar allows, with the probability that it has among what is allowed.

What a grammar allows of a whole vocabulary takes long to find out, whether it allows one token does not. So a first
draw gives each token at most the probability that it is to have, and its token is asked about. Where it is refused, or
the first draw came to no token, all that is allowed is found out, and a second draw gives what the first left to give:
together they give each token its probability to the last bits of the arithmetic.

What is asked, where `p` is the probability without the grammar:

- greedy: the likeliest token.
- no top_p: the token drawn from `p`. What is kept of those that are allowed weighs at most what would be kept of all,
  so each is to have at least its `p`. With min_p the likeliest token as well: where it is refused the threshold is
  another one, and there is no first draw.
- top_p: the tokens of at least ASKED_FROM, at most MOST_ASKED. Those that are allowed are surely kept while the
  likelier ones among them sum to less than top_p of even what is known to be allowed, and all that are kept weigh no
  more than if every other token were allowed. So the first draw leaves few unlikely tokens to the second; where no
  token reaches ASKED_FROM it leaves all of them.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from hetero_attn.serving.draws.likely import before_top_p, pick
from hetero_attn.serving.sampling_params import SamplingParams

ASKED_FROM = 0.002  # asking about a token takes some thousandth of what a draw with all that is allowed takes
MOST_ASKED = 64
ROUNDING = 1e-12  # of sums of probabilities in another order
Asking = Callable[[Sequence[int]], Sequence[bool]]


class FirstDraw(NamedTuple):
    """What a first draw came to.

    Attributes:
        token_id: the token, which is allowed; None where a second draw has to give one.
        given: tokens that it might have been, int64, and the probability of each, float64; None where these are in the
            ratio of what is wanted, so that as much is left of each.
    """

    token_id: int | None
    given: tuple[torch.Tensor, torch.Tensor] | None = None


def first_draw(
    logits: torch.Tensor, best: int, params: SamplingParams, asking: Asking, number: Callable[[], float]
) -> FirstDraw:
    """Try to draw a token that a grammar allows by asking about few.

    Args:
        logits: as `likely_tokens` takes them, without the grammar.
        best: the first of the largest.
        params: how to choose.
        asking: whether tokens are allowed.
        number: a fresh number in (0, 1].
    """
    if params.greedy:
        return FirstDraw(best if asking([best])[0] else None)
    token_ids, shares = before_top_p(logits, params, breaks_ties=True)
    if params.top_p < 1.0:
        return _from_the_likeliest(token_ids, shares, params, asking, number)
    token_id = pick(token_ids, shares, number())
    is_allowed, *best_is = asking([token_id, best] if params.min_p > 0 else [token_id])
    if is_allowed and all(best_is):
        return FirstDraw(token_id)
    return FirstDraw(None, (token_ids, shares) if len(token_ids) == params.top_k and all(best_is) else None)


def second_draw(token_ids: torch.Tensor, weights: torch.Tensor, first: FirstDraw, number: Callable[[], float]) -> int:
    """Draw what the first draw left to give of the probabilities that a grammar leaves: `likely_tokens` of what it
    allows, ids ascending, ties broken."""
    left = weights / weights.sum()
    if first.given is not None:
        given_ids, given = first.given
        places = torch.searchsorted(token_ids, given_ids).clamp(max=len(token_ids) - 1)
        is_here = token_ids[places] == given_ids
        left[places[is_here]] -= given[is_here]
        left.clamp_(min=0.0)
    return pick(token_ids, left if float(left.sum()) > 0.0 else weights, number())


def _from_the_likeliest(
    token_ids: torch.Tensor,
    shares: torch.Tensor,
    params: SamplingParams,
    asking: Asking,
    number: Callable[[], float],
) -> FirstDraw:
    ids, weights = token_ids.cpu().numpy(), shares.cpu().numpy()
    places = np.flatnonzero(weights >= ASKED_FROM)
    head = sorted(zip((-weights[places]).tolist(), ids[places].tolist(), strict=True))[:MOST_ASKED]
    answers = asking([token_id for _, token_id in head])
    if not any(answers) or (params.min_p > 0 and not answers[0]):
        return FirstDraw(None)
    # Behind a token that is refused another one may come into top_k, which is no likelier than the last.
    least = float(weights.min()) if len(ids) == params.top_k else 0.0
    most = 1.0 + sum(less + least for (less, _), is_allowed in zip(head, answers, strict=True) if not is_allowed)
    unasked = ASKED_FROM if len(head) == len(places) else -head[-1][0]
    known = [(token_id, -less) for (less, token_id), is_allowed in zip(head, answers, strict=True) if is_allowed]
    kept, together = _surely_kept([share for _, share in known], params.top_p, most, unasked)
    reached = number() * together
    for token_id, share in known[:kept]:
        reached -= share
        if reached <= 0.0:
            return FirstDraw(token_id)
    given_ids, given = zip(*known[:kept], strict=True)
    return FirstDraw(None, (token_ids.new_tensor(given_ids), shares.new_tensor(given) / together))


def _surely_kept(shares: Sequence[float], top_p: float, most: float, unasked: float) -> tuple[int, float]:
    """How many of the likeliest tokens that are allowed top_p surely keeps, and what all that it keeps weigh at most.

    shares: of the tokens that are known to be allowed, the largest first. most: what all that are allowed weigh at
    most. unasked: what each of the others weighs at most.
    """
    sums = list(accumulate(shares))
    kept = 1 + bisect_left(sums, top_p * sums[-1] * (1.0 - ROUNDING), hi=len(sums) - 1)
    weight, end = sums[kept - 1], top_p * most * (1.0 + ROUNDING)
    if weight >= end:
        return kept, weight
    last = shares[kept] if kept < len(shares) else unasked  # the last one that is kept may reach beyond the end
    return kept, max(weight, min(most, end + last))
