"""Which tokens temperature, min_p, top_k and top_p keep, and a draw among them."""

import math
import sys

import numpy as np
import torch

from hetero_attn.serving.sampling_params import SamplingParams


def likely_tokens(
    logits: torch.Tensor, params: SamplingParams, breaks_ties: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that temperature (above 0), min_p, top_k and top_p leave, and their weights for a draw.

    Args:
        logits: float32 [vocab_size], biased and penalised already; at least one is finite, none is NaN or +inf.
        params: how to choose.
        breaks_ties: of tokens that tie with the last of top_k, those of the lowest ids stay, so that top_k are kept;
            else all of them.

    Returns:
        Token ids int64 [kept], ascending, and weights float64 [kept] in the ratio of their probabilities, 0 for tokens
        whose logit is -inf.
    """
    token_ids, weights = before_top_p(logits, params, breaks_ties)
    if params.top_p == 1.0:
        return token_ids, weights
    kept = _keep_top_p(weights, params.top_p)
    return token_ids[kept], weights[kept]


def before_top_p(
    logits: torch.Tensor, params: SamplingParams, breaks_ties: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `likely_tokens` without top_p: token ids, ascending, and probabilities float64 among them."""
    # Subtracting the largest first keeps any temperature, however small, from overflowing.
    scaled = (logits.double() - logits.max().double()) / params.temperature
    token_ids = _keep_likely(scaled, params.min_p, params.top_k)
    if breaks_ties and 0 < params.top_k < len(token_ids):
        order = scaled[token_ids].sort(descending=True, stable=True).indices
        token_ids = token_ids[order[: params.top_k].sort().values]
    return token_ids, torch.softmax(
        scaled if len(token_ids) == len(scaled) else scaled.index_select(0, token_ids), dim=0
    )


def pick(token_ids: torch.Tensor, weights: torch.Tensor, share: float) -> int:
    """The token at a share in (0, 1] of all weights: an inversion of their cumulative distribution, in their order."""
    cumulative = weights.cumsum(dim=0)
    # The first entry that reaches a positive share of the total always has a weight above zero.
    return int(token_ids[torch.searchsorted(cumulative, cumulative[-1] * share)])


def _keep_likely(scaled: torch.Tensor, min_p: float, top_k: int) -> torch.Tensor:
    """Return the ids, ascending, that min_p and then top_k leave of `scaled` (logits over temperature, largest 0)."""
    threshold = math.log(min_p) if min_p > 0 else -sys.float_info.max
    if 0 < top_k < len(scaled):
        # Where min_p leaves fewer than top_k, the k-th value lies below its threshold, so one comparison does for both.
        threshold = max(threshold, float(torch.topk(scaled, top_k).values[-1]))
    # Tokens of no weight may stay: no draw ends at one, and leaving them out of so many costs more than the draw.
    if not (min_p > 0 or 0 < top_k < len(scaled)) or float(scaled.amin()) >= threshold:
        return torch.arange(len(scaled), device=scaled.device)
    return _places(scaled >= threshold)


def _places(condition: torch.Tensor) -> torch.Tensor:
    """Where bool [vocab_size] holds, ascending; numpy takes a fifth of torch's time."""
    if condition.device.type != "cpu":
        return condition.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(condition.numpy()))


def _keep_top_p(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the indices, ascending, of the fewest largest probabilities that sum to at least `top_p`."""
    # Even all together, tokens this unlikely cannot make up 1 - top_p: they go without being sorted. The half keeps
    # rounding from ever dropping the most likely token.
    hopeful = _places(probabilities * len(probabilities) >= 0.5 * (1.0 - top_p))
    ordered, order = probabilities[hopeful].sort(descending=True, stable=True)
    before = ordered.cumsum(dim=0) - ordered
    return hopeful[order[before < top_p]].sort().values
