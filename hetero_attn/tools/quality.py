"""What rounding a model's weights costs on a text: perplexity, KL divergence and agreement, recipe by recipe.

The text is cut into windows that are read each on its own, every token given (teacher forcing). The unquantised model
reads them first, and its distributions are kept in a file that has no name; so two models are never in memory at once.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

import numpy as np
import torch

from hetero_attn.errors import PromptError
from hetero_attn.llm import LLM
from hetero_attn.planning.options import LoadOptions

WINDOW_TOKENS = 512
MOST_WINDOWS = 6


@dataclass(frozen=True, slots=True)
class Quality:
    """One way to hold a model's weights. weight_bytes: of linears and embedding. mean_kl: of the unquantised
    model's next-token distribution to this one, natural log, mean over positions. same_top: share of positions whose
    most likely token is the same."""

    dtype: str
    weight_bytes: int
    perplexity: float
    mean_kl: float
    same_top: float


@dataclass(frozen=True, slots=True)
class QualityReport:
    """rows: the unquantised model first, then what it was compared with, in the order asked for."""

    model: str
    tokens: int
    rows: tuple[Quality, ...]

    def table(self) -> str:
        """Plain text for people, at most 80 columns wide."""
        lines = [
            f"{self.model}, {self.tokens} tokens, from {self.rows[0].dtype}",
            f"{'weights':<22}{'MiB':>9}{'perplexity':>12}{'change':>9}{'mean KL':>11}{'same top token':>16}",
        ]
        for row in self.rows:
            change = 100 * (row.perplexity / self.rows[0].perplexity - 1)
            lines.append(
                f"{row.dtype:<22}{row.weight_bytes / 2**20:>9.1f}{row.perplexity:>12.3f}{change:>+8.2f}%"
                f"{row.mean_kl:>11.5f}{row.same_top:>16.2%}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def run(wishes: LoadOptions, text: str, dtypes: Sequence[str], progress: bool = False) -> QualityReport:
    """Compare a model held in each of `dtypes` with what its files hold, in float32 arithmetic where they hold codes.

    wishes: how to load it; its dtype and context are set here. Raises PromptError for a text of fewer than two tokens
    or a model without a tokenizer, and what loading raises.
    """
    from hetero_attn.planning.settle import settle

    stored = settle(replace(wishes, dtype="auto", max_context=WINDOW_TOKENS)).weight_formats
    plain = "auto" if set(stored.names) <= {"bf16", "fp16", "fp32"} else "fp32"
    with tempfile.TemporaryFile() as kept:
        with _loaded(wishes, plain, progress) as llm:
            windows = _windows(llm, text)
            rows = [_first(llm, windows, kept)]
        for dtype in dtypes:
            with _loaded(wishes, dtype, progress) as llm:
                rows.append(_compared(llm, windows, kept))
    return QualityReport(llm.plan.model, sum(map(len, windows)), tuple(rows))


def _loaded(wishes: LoadOptions, dtype: str, progress: bool) -> LLM:
    given = {name: getattr(wishes, name) for name in LoadOptions.__slots__}
    return LLM(**given | {"dtype": dtype, "max_context": WINDOW_TOKENS, "progress": progress})


def _windows(llm: LLM, text: str) -> list[list[int]]:
    if llm.tokenizer is None:
        raise PromptError(f"{llm.plan.model} has no tokenizer, so there is no text to measure on; add its files")
    ids = list(llm.tokenizer.encode(text))[: MOST_WINDOWS * WINDOW_TOKENS]
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise PromptError(f"the text has {len(ids)} tokens; at least two are needed, and some thousands say something")
    return windows


def _first(llm: LLM, windows: Sequence[list[int]], kept: BinaryIO) -> Quality:
    losses: list[float] = []
    for window in windows:
        logs = torch.log_softmax(llm.logits(window), -1)
        losses += _losses(logs, window)
        logs.numpy().tofile(kept)
    return Quality(llm.planned.weight_dtype, _weight_bytes(llm), _perplexity(losses), 0.0, 1.0)


def _compared(llm: LLM, windows: Sequence[list[int]], kept: BinaryIO) -> Quality:
    losses: list[float] = []
    divergence, same, vocab_size = 0.0, 0, llm.planned.config.vocab_size
    kept.seek(0)
    for window in windows:
        logs = torch.log_softmax(llm.logits(window), -1)
        losses += _losses(logs, window)
        wanted = np.fromfile(kept, np.float32, len(window) * vocab_size).reshape(len(window), vocab_size)
        for row, other in zip(logs, torch.from_numpy(wanted), strict=True):
            divergence += (other.double().exp() * (other.double() - row.double())).sum().item()
            same += int(row.argmax() == other.argmax())
    tokens = sum(map(len, windows))
    return Quality(
        llm.planned.weight_dtype,
        _weight_bytes(llm),
        _perplexity(losses),
        max(0.0, divergence / tokens),
        same / tokens,
    )


def _losses(logs: torch.Tensor, window: list[int]) -> list[float]:
    return (-logs[torch.arange(len(window) - 1, device="cpu"), torch.tensor(window[1:], device="cpu")]).tolist()


def _perplexity(losses: list[float]) -> float:
    return math.exp(math.fsum(losses) / len(losses))


def _weight_bytes(llm: LLM) -> int:
    return llm.plan.workload.weight_bytes + llm.plan.workload.embed_bytes
