"""Scales and minima of least squared error for groups of weights: a search over ranges, then least squares.

Weights are float32 [groups, inputs of a group]. A candidate's error is that of the numbers as they will be stored,
rounded to float16, so the best of them never gets worse by being written down.
"""

from collections.abc import Callable, Iterable

import torch

Fit = tuple[torch.Tensor, torch.Tensor]  # scale and minimum, [groups]
REFITS = 2
SHRINKS = tuple((up, down) for up in (0.0, 0.035, 0.07, 0.1) for down in (0.0, 0.035, 0.07, 0.1))
SIDES = (1.0, -1.0)


def half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, within its finite range."""
    return values.clamp(-65504.0, 65504.0).half().float()


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def codes_of(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | float, low: int, high: int):
    """round((value - minimum) / scale) clamped to low..high, float32; scale and minimum broadcast."""
    return ((values - minimum) * inverse(scale)).round_().clamp_(low, high)


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


def fit_symmetric(
    values: torch.Tensor, low: int, high: int, rounded: Callable[[torch.Tensor], torch.Tensor] = half
) -> torch.Tensor:
    """Scales [groups] for codes low..high without a minimum; negative ones are possible.

    rounded: what becomes of a scale when it is stored.
    """
    values = values.t().contiguous()  # sums over the inputs of many groups at a time are many times faster
    best, extreme = Best(values.shape[1]), _extreme(values)
    for side in SIDES:
        end = low if side > 0 else high
        for step in (0.0, 0.5, 1.0, 1.5):
            scale = extreme / (end - step if end > 0 else end + step)
            for _ in range(REFITS):
                scale = rounded(scale)
                codes = codes_of(values, scale, 0.0, low, high)
                best.offer((values - codes * scale).square_().sum(0), scale)
                square = codes.square().sum(0)
                scale = (codes * values).sum(0) * inverse(square)
    return best.scale


def _extreme(values: torch.Tensor) -> torch.Tensor:
    """Of every column the number furthest from 0."""
    smallest, largest = values.amin(0), values.amax(0)
    return torch.where(largest > -smallest, largest, smallest)


def fit_affine(
    values: torch.Tensor, high: int, below_zero: bool = False, rounded: Callable[[torch.Tensor], torch.Tensor] = half
) -> Fit:
    """Scales and minima [groups] for codes 0..high. below_zero: no minimum may be above 0."""
    values = values.t().contiguous()
    count, best = values.shape[0], Best(values.shape[1])
    smallest, largest = values.amin(0), values.amax(0)
    if below_zero:
        smallest = smallest.clamp(max=0.0)
    sum_of = values.sum(0)
    for up, down in SHRINKS:
        minimum = smallest + up * (largest - smallest)
        scale = (largest - down * (largest - smallest) - minimum) / high
        for _ in range(REFITS):
            scale, minimum = rounded(scale), rounded(minimum)
            codes = codes_of(values, scale, minimum, 0, high)
            fitted = torch.addcmul(minimum, codes, scale)
            best.offer((values - fitted).square_().sum(0), scale, minimum)
            scale, minimum = _least_squares(codes, values, sum_of, count, below_zero)
    return best.scale, best.minimum


def _least_squares(
    codes: torch.Tensor, values: torch.Tensor, sum_of: torch.Tensor, count: int, below_zero: bool
) -> Fit:
    sum_c, square, product = codes.sum(0), codes.square().sum(0), (codes * values).sum(0)
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
    values: torch.Tensor, table: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor] = half
) -> torch.Tensor:
    """Scales [groups] for codes that are indexes of a sorted table; negative ones are possible."""
    values = values.t().contiguous()  # sums over the inputs of many groups at a time are many times faster
    best, extreme = Best(values.shape[1]), _extreme(values)
    ends: Iterable[float] = (table[0].item(), table[-1].item())
    for end in ends:
        for factor in (0.88, 0.94, 1.0, 1.06):
            scale = extreme / (end * factor)
            for _ in range(REFITS):
                scale = rounded(scale)
                entries = table[nearest_entries(values * inverse(scale), table).int()]
                best.offer((values - entries * scale).square_().sum(0), scale)
                scale = (entries * values).sum(0) * inverse(entries.square().sum(0))
    return best.scale
