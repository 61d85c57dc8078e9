"""Times of passes for tests of what drafts pay, which no clock has measured."""

from hetero_attn.speculation.width import PassCosts


def flat(rows: int) -> float:
    return 1 + 0.07 * (rows - 1)


def measured(costs: PassCosts) -> PassCosts:
    """A pass of one row is known; what others cost is guessed from it."""
    for _ in range(2):
        costs.observe(1, 1.0)
    return costs
