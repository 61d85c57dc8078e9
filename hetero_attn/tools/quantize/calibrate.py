"""A model loaded to be measured and rounded on a text: which of its weights need how many bits, and their codes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from cpu_kernels import CpuKernels
from hetero_attn.errors import PromptError
from hetero_attn.llm import LLM
from hetero_attn.tools.quantize.choose import Loss
from hetero_attn.tools.quantize.feedback import CALIBRATION_WINDOWS, encode_by_layers
from hetero_attn.tools.quantize.layer_runs import cut, layer_runs
from hetero_attn.tools.quantize.sensitivity import MEASURED_TOKENS, losses

WINDOW_TOKENS = 512
TOGETHER = 8  # windows, or variants of a layer, that run as one


class Calibration:
    """A model in float32 with the tokens of a calibration text; made by `calibration`."""

    def __init__(self, llm: LLM, tokens: list[int], ops: CpuKernels) -> None:
        self._llm, self._tokens, self._ops = llm, tokens, ops

    def losses(self, own: Mapping[str, str]) -> dict[str, Loss]:
        """What every weight costs in each type that it may have, by its stack; own: the types of codes in which the
        model's file has them, likewise."""
        windows = cut(self._tokens, MEASURED_TOKENS, 1)
        with layer_runs(self._llm.engine, windows, TOGETHER, self._llm.plan.num_threads) as runs:
            return losses(runs, own, self._ops)

    def encoded(self, chosen: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """The bytes of these matrices in their types, uint8 [rows, row_bytes]; the model is the rounded one from then
        on."""
        windows = cut(self._tokens, WINDOW_TOKENS, CALIBRATION_WINDOWS)
        together = min(TOGETHER, windows.shape[0])
        with layer_runs(self._llm.engine, windows, together, self._llm.plan.num_threads) as runs:
            return encode_by_layers(runs, chosen, self._ops)


@contextmanager
def calibration(
    model: Path, text: str, ops: CpuKernels, threads: int | None, tokenizer: str | Path | None
) -> Iterator[Calibration]:
    """Load a model for it. tokenizer: what reads the text, None for the model's own. Raises PromptError for a text of
    fewer than two tokens, and what loading raises."""
    with LLM(
        model,
        device="cpu",
        dtype="fp32",
        kv_dtype="fp32",
        max_context=WINDOW_TOKENS,
        max_batch=TOGETHER,
        num_threads=threads,
        tokenizer=tokenizer,
        progress=True,
    ) as llm:
        if llm.tokenizer is None:
            raise PromptError(f"{model} has no tokenizer, so a text says nothing; leave --calibrate out")
        tokens = list(llm.tokenizer.encode(text))
        if len(tokens) < 2:
            raise PromptError(f"the calibration text has {len(tokens)} tokens; give some thousands")
        yield Calibration(llm, tokens, ops)
