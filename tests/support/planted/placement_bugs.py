"""Errors of a placement, planted: each changes little in a layer, and has to be caught and named."""

from collections.abc import Callable

import torch
from pytest import MonkeyPatch

import hetero_attn.lanes.staging
from cpu_kernels.contract import Partial
from gpu_kernels import reference
from hetero_attn.cache.pool import CachePool


def _token_dropped_at_the_boundary(monkeypatch: MonkeyPatch) -> None:
    """The boundary is one token further than the pages that were moved: a token is in neither segment."""
    original = CachePool.boundary
    monkeypatch.setattr(CachePool, "boundary", lambda self, slot: (at := original(self, slot)) + (at > 0))


def _base_two_lse(monkeypatch: MonkeyPatch) -> None:
    """One side's partial carries a base-2 lse into a merge by natural logarithms."""
    for name in ("decode_attention", "prefill_attention"):
        original = getattr(reference, name)

        def base_two(*arguments, original=original):
            original(*arguments)
            next(each for each in arguments if isinstance(each, Partial)).lse.mul_(1.4426950408889634)

        monkeypatch.setattr(reference, name, base_two)


def _average_instead_of_merge(monkeypatch: MonkeyPatch) -> None:
    def average(partials, into):
        into.out.copy_(torch.stack([partial.out for partial in partials]).mean(0))

    monkeypatch.setattr(reference, "merge", average)


def _stale_staging_buffer(monkeypatch: MonkeyPatch) -> None:
    """Every fifth copy into the ring is lost, so a linear reads the piece that was there before."""
    original, count = hetero_attn.lanes.staging.StagingRing._fill, iter(range(10**9))

    def lossy(self, slot):
        copy = self.device.copy
        if next(count) % 5 == 4:
            self.device.copy = lambda *arguments: None
        original(self, slot)
        self.device.copy = copy

    monkeypatch.setattr(hetero_attn.lanes.staging.StagingRing, "_fill", lossy)


def _norm_without_its_epsilon_in_the_yardstick_too(monkeypatch: MonkeyPatch) -> None:
    """The twin computes by the reference operations: a bug there must not stretch the yardstick over itself."""
    original = reference.rms_norm

    def forgetful(x, weight, eps, out, *how):
        original(x, weight, eps + x.square().mean().item(), out, *how)

    for module in (reference, reference.elementwise):  # what rounds a norm in one op calls the latter's
        monkeypatch.setattr(module, "rms_norm", forgetful)


PLANTED: dict[str, Callable[[MonkeyPatch], None]] = {
    "token dropped at the boundary": _token_dropped_at_the_boundary,
    "base two lse": _base_two_lse,
    "average instead of merge": _average_instead_of_merge,
    "stale staging buffer": _stale_staging_buffer,
    "norm without its epsilon in the yardstick too": _norm_without_its_epsilon_in_the_yardstick_too,
}
