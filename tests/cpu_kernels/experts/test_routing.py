"""route against plain formulas: which experts a row goes to and with what weights, alike on every lane."""

import pytest
import torch

from cpu_kernels.contract import Routes, Scoring
from gpu_kernels import reference
from gpu_kernels.experts import routing as gpu_routing
from tests.support.kernels.cpu_oracles import kernels, routing


def chosen_plainly(x, router, experts, top_k, gated, normalise):
    """Ids and weights by sorting pairs (score, id) in Python, in float64."""
    logits = x.double() @ router.double().T
    scores = torch.softmax(logits[:, :experts], -1)
    ids = [sorted(sorted(range(experts), key=lambda e: (-row[e], e))[:top_k]) for row in logits.tolist()]
    weights = torch.stack([row[each] for row, each in zip(scores, ids, strict=True)])
    if normalise:
        weights /= weights.sum(-1, keepdim=True)
    gate = torch.sigmoid(logits[:, experts]) if gated else torch.ones(len(ids), dtype=torch.float64)
    return torch.tensor(ids), torch.cat([weights, gate[:, None]], -1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("rows", "experts", "top_k"), [(1, 8, 2), (3, 128, 8), (19, 60, 4), (9, 5, 5), (4, 1, 1)])
def test_the_best_experts_are_chosen(rows, experts, top_k, gated, normalise):
    (ids, places, sources, starts, weights), x, router = routing(
        rows, 100, experts, top_k, gated=gated, normalise=normalise
    )
    expected_ids, expected_weights = chosen_plainly(x, router, experts, top_k, gated, normalise)

    assert torch.equal(ids.long(), expected_ids)
    assert torch.allclose(weights.double(), expected_weights, rtol=2e-6, atol=1e-12)
    in_order = sorted((int(e), row) for row in range(rows) for e in ids[row])
    assert [row for _, row in in_order] == sources.tolist()
    assert starts.tolist() == [sum(e < each for e, _ in in_order) for each in range(experts + 1)]
    assert all(in_order[places[row, j]] == (int(ids[row, j]), row) for row in range(rows) for j in range(top_k))


@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_of_equal_scores_the_lower_id_wins(ops):
    """Every score equal, then two groups of equals; all negative."""
    x, router = torch.ones(2, 16), torch.zeros(16, 16)
    router[:12] = -1.0
    router[[3, 7, 9]] = -0.5
    outputs = [torch.zeros(2, 5, dtype=torch.int32) for _ in range(2)]
    outputs += [torch.zeros(10, dtype=torch.int32), torch.zeros(13, dtype=torch.int32), torch.zeros(2, 6)]
    (ops or kernels()).route(x, router, Scoring(), Routes(*outputs))

    assert outputs[0].tolist() == [[0, 1, 3, 7, 9]] * 2


SCORINGS = {
    "bias": {"bias": True},
    "sigmoid": {"sigmoid": True, "eps": 1e-20},
    "corrected": {"sigmoid": True, "correction": True, "normalised": False, "scale": 2.5},
    "groups": {"sigmoid": True, "correction": True, "groups": 4, "kept_groups": 2, "eps": 1e-20, "scale": 1.5},
}


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("ops", [reference, gpu_routing, None], ids=["reference", "gpu", "kernels"])
def test_scores_of_other_models(ops, name):
    """Biases, sigmoids, corrections that only choose, groups, and scales, row by row in Python, in float64."""
    experts, top_k, generator = 24, 3, torch.Generator().manual_seed(3)
    x, router = torch.randn(17, 40, generator=generator), torch.zeros(32, 40)
    router[:experts] = torch.randn(experts, 40, generator=generator) * 0.2
    x[0], router[:experts, 0] = torch.eye(40)[0] * 30, -1 - router[:experts, 0].abs()  # every product far below zero
    drawn = {key: torch.randn(experts, generator=generator) for key in ("bias", "correction")}
    scoring = Scoring(**{key: drawn[key] if key in drawn else value for key, value in SCORINGS[name].items()})
    ids, places = (torch.zeros(17, top_k, dtype=torch.int32) for _ in range(2))
    sources, starts = torch.zeros(51, dtype=torch.int32), torch.zeros(experts + 1, dtype=torch.int32)
    weights = torch.full((17, top_k + 1), torch.nan)
    (ops or kernels()).route(x, router, scoring, Routes(ids, places, sources, starts, weights))

    for row in range(17):
        logits = (x[row].double() @ router[:experts].double().T) + (0 if scoring.bias is None else scoring.bias)
        scores = torch.sigmoid(logits) if scoring.sigmoid else torch.softmax(logits, -1)
        choice = (scores + (0 if scoring.correction is None else scoring.correction)).view(scoring.groups, -1)
        sums = choice.sort(-1, descending=True).values[:, :2].sum(-1)
        shut = sums.argsort(descending=True)[scoring.kept_groups :]
        choice[shut] = -torch.inf
        best = choice.flatten().topk(top_k).indices.sort().values
        expected = scores[best] / (scores[best].sum() + scoring.eps) if scoring.normalised else scores[best]
        assert ids[row].tolist() == best.tolist()
        assert torch.allclose(weights[row, :top_k].double(), expected * scoring.scale, rtol=2e-5, atol=0)
    assert weights[:, top_k].eq(1).all() and weights.isfinite().all()


def test_a_row_is_routed_alike_whatever_stands_beside_it():
    """The same bits of every weight, alone and among others, for any number of threads."""
    together, x, _ = routing(37, 200, 24, 3)
    for row in (0, 5, 36):
        ids, weights = (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 4))
        router = routing(37, 200, 24, 3)[2]
        spare = [torch.zeros(size, dtype=torch.int32) for size in (3, 25)]
        kernels().route(
            x[row : row + 1], router, Scoring(True, False), Routes(ids, torch.zeros_like(ids), *spare, weights)
        )

        assert torch.equal(ids[0], together[0][row]) and torch.equal(weights[0], together[4][row])


@pytest.mark.parametrize("ops", [gpu_routing, None], ids=["gpu", "kernels"])
def test_a_bad_value_gives_valid_ids_and_shows_in_its_row_alone(ops):
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    (ids, places, _, _, weights), *_ = routing(3, 64, 20, 4, x=x, ops=ops)

    assert ids.min() >= 0 and ids.max() < 20 and (ids.diff(dim=1) > 0).all()
    assert sorted(places.flatten().tolist()) == list(range(12))
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()


def test_reference_and_kernels_route_alike():
    ours, x, _ = routing(11, 96, 40, 6, normalise=True)
    theirs, *_ = routing(11, 96, 40, 6, normalise=True, ops=reference, x=x)

    assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
    assert torch.allclose(ours[4], theirs[4], rtol=2e-5)


@pytest.mark.parametrize(("rows", "gated", "normalise"), [(1, True, False), (1, False, True), (11, True, True)])
def test_the_gpu_lane_routes_as_the_kernels_do(rows, gated, normalise):
    """Its operations are torch's, so they run anywhere."""
    ours, *_ = routing(rows, 96, 40, 6, gated=gated, normalise=normalise)
    theirs, *_ = routing(rows, 96, 40, 6, gated=gated, normalise=normalise, ops=gpu_routing)

    assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
    assert torch.allclose(ours[4], theirs[4], rtol=2e-5)


@pytest.fixture
def products_in_tf32():
    """The process allows TF32, by the newer of torch's two interfaces for it."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    yield products
    products.fp32_precision = before


def test_the_gpu_lane_routes_whatever_the_process_allows_its_products(products_in_tf32):
    """torch refuses to say by one interface what was set by the other."""
    expected, *_ = routing(5, 96, 40, 6)
    found, *_ = routing(5, 96, 40, 6, ops=gpu_routing)

    assert torch.equal(found[0], expected[0])
    assert products_in_tf32.fp32_precision == "tf32"
