"""Runs of a text through an engine with its tokens given (teacher forcing), and comparisons of two such runs.

free       every layer reads what the layer before it wrote: errors add up over the depth of the model
following  every layer reads what another run had there: what differs is one layer's own doing, however deep it lies
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from hetero_attn.cache.pool import SequenceState
from hetero_attn.engine.engine import Engine

TINIEST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class Distance:
    """How far logits are from others of the same text.

    nmse: squared error over squared norm. mean_kl: of the other's next-token distribution to this one, natural log,
    mean over positions. token_agreement: share of positions whose most likely token is the same.
    """

    nmse: float
    mean_kl: float
    token_agreement: float


def distance(actual: torch.Tensor, expected: torch.Tensor) -> Distance:
    """How far `actual` is from `expected`, both float32 [tokens, vocab_size]."""
    error = norm = divergence = same = 0.0
    for row, wanted in zip(actual, expected, strict=True):
        row, wanted = row.double(), wanted.double()
        error, norm = error + (row - wanted).pow(2).sum().item(), norm + wanted.pow(2).sum().item()
        logs, wanted_logs = torch.log_softmax(row, -1), torch.log_softmax(wanted, -1)
        divergence += (wanted_logs.exp() * (wanted_logs - logs)).sum().item()
        same += int(row.argmax() == wanted.argmax())
    return Distance(error / norm, max(0.0, divergence) / len(actual), same / len(actual))


def generated(engine: Engine, prompt: Sequence[int], new_tokens: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Logits of a prompt and of `new_tokens` greedy tokens after it, and all the token ids."""
    rows, token_ids = [], list(prompt)
    sequence = engine.kv_cache.open()
    try:
        rows.append(_prefilled(engine, sequence, prompt))
        for _ in range(new_tokens):
            token_ids.append(int(rows[-1][-1].argmax()))
            rows.append(engine.decode_step([sequence], token_ids[-1:]))
    finally:
        engine.kv_cache.close(sequence)
    return torch.cat(rows), tuple(token_ids)


def forced(engine: Engine, token_ids: Sequence[int], decoded: int) -> torch.Tensor:
    """Logits of every token, float32 [tokens, vocab_size]; the last `decoded` tokens go one by one through decode."""
    sequence = engine.kv_cache.open()
    prompt_tokens = len(token_ids) - decoded
    try:
        rows = [_prefilled(engine, sequence, token_ids[:prompt_tokens])]
        rows += [engine.decode_step([sequence], [token_id]) for token_id in token_ids[prompt_tokens:]]
    finally:
        engine.kv_cache.close(sequence)
    return torch.cat(rows)


def _prefilled(engine: Engine, sequence: SequenceState, token_ids: Sequence[int]) -> torch.Tensor:
    chunk = engine.prefill_chunk
    starts = range(0, len(token_ids), chunk)
    return torch.cat([engine.prefill_logits(sequence, token_ids[start : start + chunk]) for start in starts])


@dataclass(frozen=True, slots=True)
class Run:
    """A free run. residuals: before every layer and after the last one, float32 [tokens, hidden_size] each."""

    token_ids: tuple[int, ...]
    decoded: int
    logits: torch.Tensor
    residuals: tuple[torch.Tensor, ...]


def recorded(engine: Engine, token_ids: Sequence[int], decoded: int) -> Run:
    """As `forced`, keeping what every layer read."""
    seen: list[list[torch.Tensor]] = [[] for _ in range(len(engine.weights.layers) + 1)]
    with engine.forward.watched_layers(lambda layer, residual: seen[layer].append(residual.to("cpu", copy=True))):
        logits = forced(engine, token_ids, decoded)
    return Run(tuple(token_ids), decoded, logits, tuple(torch.cat(rows) for rows in seen))


def stage_names(num_layers: int) -> tuple[str, ...]:
    """What `stage_errors` compares, in order."""
    return ("embedding", *(f"layer {layer}" for layer in range(num_layers)), "head")


def stage_errors(engine: Engine, run: Run) -> tuple[float, ...]:
    """What each stage of an engine does otherwise than in `run`, given the very residual that it had there.

    One number for the embedding, for every layer and for the head: the squared error over the square of what the stage
    added to the residual (of the logits, for the head), mean over tokens.
    """
    layers = len(run.residuals)
    sums, done = [0.0] * layers, [0] * layers

    def follow(layer: int, residual: torch.Tensor) -> None:
        rows = slice(done[layer], done[layer] + residual.shape[0])
        wanted = run.residuals[layer][rows]
        before = run.residuals[layer - 1][rows] if layer else torch.zeros_like(wanted)
        sums[layer] += _relative(residual.cpu(), wanted, wanted - before)
        residual.copy_(wanted)
        done[layer] = rows.stop

    with engine.forward.watched_layers(follow):
        logits = forced(engine, run.token_ids, run.decoded)
    sums.append(_relative(logits, run.logits, run.logits))
    return tuple(value / len(run.token_ids) for value in sums)


def neighbour_errors(run: Run) -> tuple[float, ...]:
    """What `stage_errors` would say if every number of the residual were two float32 numbers beside the exact one.

    A layer adds to the residual twice, and each sum may fall to either side of an edge. That is nothing but where a
    residual is thousands of times as large as what a layer adds, as trained models have it in a few features of some
    tokens (Sun et al. 2024, Massive Activations in Large Language Models). What rounds alike there does not show it.
    """
    found = []
    for before, after in pairwise((torch.zeros_like(run.residuals[0]), *run.residuals)):
        larger = torch.maximum(before.abs(), after.abs())
        spacing = torch.nextafter(larger, torch.full_like(larger, math.inf)) - larger
        found.append(_relative(2 * spacing, torch.zeros_like(spacing), after - before) / len(run.token_ids))
    return (*found, 0.0)


def _relative(actual: torch.Tensor, wanted: torch.Tensor, change: torch.Tensor) -> float:
    """Sum over rows of squared error over the squared norm of `change`."""
    errors = (actual.double() - wanted.double()).pow(2).sum(-1)
    return (errors / change.double().pow(2).sum(-1).clamp_min(TINIEST)).sum().item()
