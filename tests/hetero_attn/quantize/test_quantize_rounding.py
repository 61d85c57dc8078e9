"""Fits and roundings of `quantize` against slow searches and the textbook's form of error feedback."""

import pytest
import torch

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.tools.quantize.blocks import BLOCK_TYPES, Grid
from hetero_attn.tools.quantize.encode import encode, fed_back, held, known_inputs, nearest
from hetero_attn.tools.quantize.fit import codes_of, fit_affine, fit_symmetric

INPUTS = 256


@pytest.fixture(scope="module")
def ops():
    from cpu_kernels import CpuKernels

    return CpuKernels(2)


@pytest.fixture(scope="module")
def moments():
    """Of inputs that go together, of very different energy, and one that is never there."""
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(2048, 24, generator=generator) @ torch.randn(24, INPUTS, generator=generator)
    x = (mixed + torch.randn(2048, INPUTS, generator=generator)) * torch.logspace(-1, 1, INPUTS)
    x[:, 7] = 0
    return x.t() @ x / 2048


@pytest.fixture(scope="module")
def rows():
    return torch.randn(16, INPUTS, generator=torch.Generator().manual_seed(5)) * 0.1


def output_error(found, rows, moments):
    return (((found - rows) @ moments) * (found - rows)).sum().item()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_errors_that_make_up_for_each_other_cost_the_output_less(name, rows, moments, ops):
    inputs = known_inputs(moments, 2048)
    plain, fed = (held(name, encode(name, rows, known), INPUTS, ops) for known in (None, inputs))

    assert output_error(fed, rows, moments) < 0.75 * output_error(plain, rows, moments)


@pytest.mark.parametrize("name", ["Q5_1", "IQ4_XS"])
def test_feedback_is_the_textbooks(name, rows, moments):
    """Optimal brain surgeon: after each input the inverse of what is left is made anew, and the rest are moved by it."""
    kind, inputs = BLOCK_TYPES[name], known_inputs(moments, 2048)
    grid = kind.fit(rows.reshape(-1, GGUF_BY_NAME[name].items), None)
    found = fed_back(kind, rows, grid, inputs)

    expected = slow_feedback(kind, rows, grid, damped(moments, 2048), inputs.order)
    assert (found != expected).float().mean() < 0.002  # numbers at an edge fall to either side


def damped(moments, tokens):
    found = moments.double() * (tokens / (tokens + INPUTS))
    found.diagonal().copy_(moments.diagonal() + 0.01 * moments.diagonal().mean())
    return found


def slow_feedback(kind, rows, grid, moments, order):
    left, codes = rows.double().clone(), torch.zeros_like(rows)
    scale = grid.scale.view(len(rows), -1).repeat_interleave(kind.group, 1)
    minimum = torch.zeros_like(scale)
    if grid.minimum is not None:
        minimum = grid.minimum.view(len(rows), -1).repeat_interleave(kind.group, 1)
    remaining = order.tolist()
    while remaining:
        here, inverse = remaining[0], torch.linalg.inv(moments[remaining][:, remaining])
        own = scale[:, here], minimum[:, here]
        codes[:, here] = kind.codes(left[:, here].float(), *own)
        missed = left[:, here] - kind.values(codes[:, here], *own)
        left[:, remaining] -= missed[:, None] / inverse[0, 0] * inverse[0]
        remaining.pop(0)
    return codes


def test_inputs_without_relation_are_rounded_to_the_nearest(rows):
    kind, grid = BLOCK_TYPES["Q4_1"], BLOCK_TYPES["Q4_1"].fit(rows.reshape(-1, 32), None)
    inputs = known_inputs(torch.eye(INPUTS), 2048)

    assert torch.equal(fed_back(kind, rows, grid, inputs).reshape(-1, 32), nearest(kind, rows, grid, 32))


def test_inputs_that_never_were_are_no_division_by_zero(rows, ops):
    found = held("Q4_K", encode("Q4_K", rows, known_inputs(torch.zeros(INPUTS, INPUTS), 5)), INPUTS, ops)

    assert torch.isfinite(found).all()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_fits_are_near_the_best_of_a_dense_search(is_weighted):
    generator = torch.Generator().manual_seed(6)
    groups = torch.randn(40, 32, generator=generator)
    importance = torch.rand(40, 32, generator=generator) + 0.1 if is_weighted else None
    heavy = torch.ones(40, 32) if importance is None else importance

    def error(scale, minimum, low, high):
        codes = codes_of(groups, scale[:, None], minimum[:, None], low, high)
        return (heavy * (groups - codes * scale[:, None] - minimum[:, None]).square()).sum(1)

    zeros = torch.zeros(40)
    symmetric = error(fit_symmetric(groups, -8, 7, importance=importance), zeros, -8, 7)
    affine = error(*fit_affine(groups, 15, importance=importance), 0, 15)
    widest = groups.abs().amax(1)
    best = torch.stack([error(widest * step / 7, zeros, -8, 7) for step in torch.linspace(-1.4, 1.4, 400)]).amin(0)
    low, high = groups.amin(1), groups.amax(1)
    spans = [(low + a * (high - low), (high - low) * b / 15) for a in STEPS for b in 1 - STEPS]
    best_affine = torch.stack([error(scale, minimum, 0, 15) for minimum, scale in spans]).amin(0)

    assert symmetric.sum() < 1.03 * best.sum()
    assert affine.sum() < 1.05 * best_affine.sum()


STEPS = torch.linspace(-0.05, 0.35, 41)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_is_important_is_met_better(name, rows, ops):
    """The weighted error of a fit that knows the weights is smaller than of one that does not."""
    energy = torch.rand(INPUTS, generator=torch.Generator().manual_seed(8)) ** 4 + 1e-3
    kind, items = BLOCK_TYPES[name], GGUF_BY_NAME[name].items
    importance = energy.view(-1, items).repeat(len(rows), 1)

    def error(grid: Grid) -> float:
        data = kind.pack(grid.stored, nearest(kind, rows, grid, items)).view(len(rows), -1)
        return ((held(name, data, INPUTS, ops) - rows).square() * energy).sum().item()

    values = rows.reshape(-1, items)
    assert error(kind.fit(values, importance)) < error(kind.fit(values, None))
