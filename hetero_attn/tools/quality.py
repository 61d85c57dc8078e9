"""What rounding a model's weights costs on a text: perplexity, KL divergence and agreement, recipe by recipe, of the
model itself or of a file beside the model that it was made from.

The text is cut into windows that are read each on its own, every token given (teacher forcing). The unquantised model
reads them first, and its distributions are kept in a file that has no name; so two models are never in memory at once.
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from hetero_attn.engine.host_memory import temporary_files_named
from hetero_attn.errors import PromptError
from hetero_attn.llm import LLM
from hetero_attn.planning.options import LoadOptions

if TYPE_CHECKING:
    from hetero_attn.planning.settle import PlannedModel

WINDOW_TOKENS = 512
MOST_WINDOWS = 6
NAME_COLUMNS = 21
KEPT = "distributions over all tokens"


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
    """rows: the unquantised model first, then what it was compared with, in the order asked for. against: the name of
    the unquantised model where it is another one than `model`."""

    model: str
    tokens: int
    rows: tuple[Quality, ...]
    against: str | None = None

    def table(self) -> str:
        """Plain text for people, at most 80 columns wide."""
        source = "" if self.against is None else f" of {self.against}"
        lines = [
            f"{self.model}, {self.tokens} tokens, from {self.rows[0].dtype}{source}",
            f"{'weights':<22}{'MiB':>9}{'perplexity':>12}{'change':>9}{'mean KL':>11}{'same top token':>16}",
        ]
        for row in self.rows:
            change = 100 * (row.perplexity / self.rows[0].perplexity - 1)
            lines.append(
                f"{_fitting(row.dtype):<22}{row.weight_bytes / 2**20:>9.1f}{row.perplexity:>12.3f}{change:>+8.2f}%"
                f"{row.mean_kl:>11.5f}{row.same_top:>16.2%}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def _fitting(dtype: str) -> str:
    """The formats of a file of many, cut to their column."""
    return dtype if len(dtype) <= NAME_COLUMNS else f"{dtype[: NAME_COLUMNS - 2]}.."


def run(
    wishes: LoadOptions, text: str, dtypes: Sequence[str], progress: bool = False, against: str | Path | None = None
) -> QualityReport:
    """Compare a model held in each of `dtypes` with what the files of `against` hold, None for its own, in float32
    arithmetic where they hold codes.

    wishes: how to load it; its dtype and context are set here. Raises PromptError for a text of fewer than two tokens,
    a model without a tokenizer or one of other tokens than `against`, and what loading raises.
    """
    from hetero_attn.planning.settle import settle

    source = wishes if against is None else replace(wishes, model=against, file=None)
    stored = settle(replace(source, dtype="auto", max_context=WINDOW_TOKENS))
    if against is not None:
        _check_same_vocabulary(settle(replace(wishes, dtype="auto", max_context=WINDOW_TOKENS)), stored)
    plain = "auto" if set(stored.weight_formats.names) <= {"bf16", "fp16", "fp32"} else "fp32"
    with ExitStack() as files:
        with temporary_files_named(KEPT):
            kept = files.enter_context(tempfile.TemporaryFile())
        with _loaded(source, plain, progress) as llm:
            windows = _windows(llm, text)
            rows, name = [_first(llm, windows, kept)], llm.plan.model
        for dtype in dtypes:
            with _loaded(wishes, dtype, progress) as llm:
                if against is not None:
                    _check_same_tokens(llm, windows, text, name)
                rows.append(_compared(llm, windows, kept))
    return QualityReport(llm.plan.model, sum(map(len, windows)), tuple(rows), None if against is None else name)


def _check_same_vocabulary(planned: "PlannedModel", source: "PlannedModel") -> None:
    """Raise PromptError unless both models have as many tokens."""
    sizes = [each.config.vocab_size for each in (planned, source)]
    if sizes[0] != sizes[1]:
        raise PromptError(
            f"{planned.plan.model} has {sizes[0]} tokens and {source.plan.model} {sizes[1]}, so their distributions "
            "cannot be compared; give the model that it was made from"
        )


def _check_same_tokens(llm: LLM, windows: list[list[int]], text: str, name: str) -> None:
    """Raise PromptError unless the model makes the tokens of a text that the one called `name` makes."""
    if _windows(llm, text) != windows:
        raise PromptError(
            f"{llm.plan.model} makes other tokens of the text than {name}; give the model that it was made from, or "
            "one tokenizer for both by --tokenizer"
        )


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
        with temporary_files_named(KEPT):
            kept.write(logs.numpy())
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
