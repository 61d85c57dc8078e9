"""Scales and minima of least squared error for groups of weights: a search over ranges, then least squares.

Weights are float32 [groups, inputs of a group]; importance, where it is given, has the same shape and says how much
the square of each error counts. A candidate's error is that of the numbers as they will be stored, rounded to
float16, so the best of them never gets worse by being written down.
"""

from collections.abc import Callable, Iterable

import torch

Fit = tuple[torch.Tensor, torch.Tensor]  # scale and minimum, [groups]
Rounding = Callable[[torch.Tensor], torch.Tensor]
REFITS = 2
SHRINKS = tuple((up, down) for up in (0.0, 0.035, 0.07, 0.1) for down in (0.0, 0.035, 0.07, 0.1))
SIDES = (1.0, -1.0)
# By how much the number furthest from 0 misses the last code: the error has many valleys, one for each number's code.
STEPS = tuple(0.3 * step for step in range(-2, 11))


def half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, within its finite range."""
    return values.clamp(-65504.0, 65504.0).half().float()


def unrounded(values: torch.Tensor) -> torch.Tensor:
    """The values themselves, of numbers that are stored in two levels."""
    return values


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def codes_of(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | float, low: int, high: int):
    """round((value - minimum) / scale) clamped to low..high, float32; scale and minimum broadcast."""
    return ((values - minimum) * inverse(scale)).round_().clamp_(low, high)


def weighted(values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Values times their importance, those of none as they are."""
    return values if importance is None else values * importance


class Best:
    """The candidate of least error so far, group by group."""

    def __init__(self, groups: int) -> None:
        self.error = torch.full((groups,), torch.inf, device="cpu")
        self.scale = torch.zeros(groups, dtype=torch.float32, device="cpu")
        self.minimum = torch.zeros(groups, dtype=torch.float32, device="cpu")

    def offer(self, error: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None) -> None:
        """Keep the scale, and the minimum where there is one, of every group that it suits better."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if minimum is not None:
            self.minimum = torch.where(better, minimum, self.minimum)


def _columns(values: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A group a column: sums over the inputs of many groups at a time are many times faster."""
    return values.t().contiguous(), None if importance is None else importance.t().contiguous()


def fit_symmetric(
    values: torch.Tensor,
    low: int,
    high: int,
    rounded: Rounding = half,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales [groups] for codes low..high without a minimum; negative ones are possible.

    rounded: what becomes of a scale when it is stored.
    """
    values, importance = _columns(values, importance)
    best, extreme = Best(values.shape[1]), _extreme(values)
    for side in SIDES:
        end = low if side > 0 else high
        for step in STEPS:
            scale = extreme / (end - step if end > 0 else end + step)
            for _ in range(REFITS):
                scale = rounded(scale)
                codes = codes_of(values, scale, 0.0, low, high)
                best.offer(weighted((values - codes * scale).square_(), importance).sum(0), scale)
                scale = least_squares_scale(codes, values, importance)
    return best.scale


def least_squares_scale(codes: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None, dim: int = 0):
    """The scale that brings codes nearest to values, both with a group along `dim`; 0 where all codes are."""
    heavy = weighted(codes, importance)
    return (heavy * values).sum(dim) * inverse((heavy * codes).sum(dim))


def _extreme(values: torch.Tensor) -> torch.Tensor:
    """Of every column the number furthest from 0."""
    smallest, largest = values.amin(0), values.amax(0)
    return torch.where(largest > -smallest, largest, smallest)


def fit_affine(
    values: torch.Tensor,
    high: int,
    below_zero: bool = False,
    rounded: Rounding = half,
    importance: torch.Tensor | None = None,
) -> Fit:
    """Scales and minima [groups] for codes 0..high. below_zero: no minimum may be above 0."""
    values, importance = _columns(values, importance)
    best = Best(values.shape[1])
    smallest, largest = values.amin(0), values.amax(0)
    if below_zero:
        smallest = smallest.clamp(max=0.0)
    for up, down in SHRINKS:
        minimum = smallest + up * (largest - smallest)
        scale = (largest - down * (largest - smallest) - minimum) / high
        for _ in range(REFITS):
            scale, minimum = rounded(scale), rounded(minimum)
            codes = codes_of(values, scale, minimum, 0, high)
            fitted = torch.addcmul(minimum, codes, scale)
            best.offer(weighted((values - fitted).square_(), importance).sum(0), scale, minimum)
            scale, minimum = _least_squares(codes, values, importance, below_zero)
    return best.scale, best.minimum


def _least_squares(codes: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None, below_zero: bool) -> Fit:
    heavy = weighted(codes, importance)
    sum_c, square, product = heavy.sum(0), (heavy * codes).sum(0), (heavy * values).sum(0)
    sum_of = weighted(values, importance).sum(0)
    count: torch.Tensor | int = values.shape[0] if importance is None else importance.sum(0)
    determinant = count * square - sum_c * sum_c
    scale = (count * product - sum_c * sum_of) * inverse(determinant)
    minimum = (sum_of - scale * sum_c) / count
    if below_zero:
        above = minimum > 0
        scale = torch.where(above, product * inverse(square), scale)
        minimum = torch.where(above, 0.0, minimum)
    return scale, minimum


def nearest_entries(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 indexes of the nearest entries, whole numbers of -128..127; ties within a quarter fall anywhere."""
    halves = torch.arange(-256, 256, device="cpu") / 2
    nearest = (halves[:, None] - table).abs().argmin(1).to(torch.uint8)
    return nearest[(2 * values).round_().clamp_(-256, 255).int() + 256]


def fit_table(
    values: torch.Tensor, table: torch.Tensor, rounded: Rounding = half, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales [groups] for codes that are indexes of a sorted table; negative ones are possible."""
    values, importance = _columns(values, importance)
    best, extreme = Best(values.shape[1]), _extreme(values)
    ends: Iterable[float] = (table[0].item(), table[-1].item())
    for end in ends:
        for factor in (0.82, 0.88, 0.94, 1.0, 1.06, 1.12):
            scale = extreme / (end * factor)
            for _ in range(REFITS):
                scale = rounded(scale)
                entries = table[nearest_entries(values * inverse(scale), table).int()]
                best.offer(weighted((values - entries * scale).square_(), importance).sum(0), scale)
                scale = least_squares_scale(entries, values, importance)
    return best.scale
