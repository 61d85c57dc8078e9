"""A model's weights in their types, layer by layer, each rounded for what it will really read.

The inputs of a layer are those that the rounded layers before it give on the calibration text; its own weights are
rounded with the moments of those (`encode.fed_back`), written back as the file will hold them, and the layer is run
again to give the inputs of the next. An embedding's rows are looked up, not multiplied: they are rounded to the
nearest, also where they are the head's.
"""

from collections.abc import Iterator, Mapping

import torch

from cpu_kernels import CpuKernels
from hetero_attn.serving.progress import steps_bar
from hetero_attn.spec.weights import Part
from hetero_attn.tools.quantize.encode import Inputs, encode, held, known_inputs
from hetero_attn.tools.quantize.layer_runs import LayerRuns, Watch

CALIBRATION_WINDOWS = 8


class Moments:
    """The second moments of the inputs of products, by the address of the weight: a `Watch`."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, int] = {}

    def __call__(self, address: int, x: torch.Tensor) -> None:
        if address not in self._sums:
            self._sums[address] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device="cpu")
        self._sums[address].addmm_(x.t(), x)
        self._tokens[address] = self._tokens.get(address, 0) + x.shape[0]

    def mean(self, address: int) -> torch.Tensor | None:
        """Moments, float32 [inputs, inputs]; None of a weight that nothing was multiplied by."""
        return self._sums[address] / self._tokens[address] if address in self._sums else None

    def inputs(self, address: int) -> Inputs | None:
        """What rounding needs of them; None where there are none."""
        mean = self.mean(address)
        return None if mean is None else known_inputs(mean, self._tokens[address])


def encode_by_layers(runs: LayerRuns, chosen: Mapping[str, str], ops: CpuKernels) -> dict[str, torch.Tensor]:
    """uint8 [rows, row_bytes] of every matrix that `chosen` has a type for, by the name of its tensor. The engine's
    weights become the rounded ones; the others stay as they are."""
    found: dict[str, torch.Tensor] = {}
    name, embedding = runs.embedding
    head = list(runs.head_parts())
    is_tied = head[0][0].tensor == name
    rows = head[0][1] if is_tied else embedding[None]
    if name in chosen:
        found[name] = _rounded(rows, embedding.shape[0] if not is_tied else head[0][0].rows, chosen[name], None, ops)
    hidden = runs.embedded()
    for layer in steps_bar(range(runs.layers), "rounding layer by layer"):
        moments = Moments()
        runs.after_layer(layer, hidden, moments)
        found |= _each(runs.parts(layer), moments, chosen, ops)
        hidden = runs.after_layer(layer, hidden)
    if not is_tied:
        moments = Moments()
        _watch_head(runs, hidden, moments)
        found |= _each(iter(head), moments, chosen, ops)
    return found


def _watch_head(runs: LayerRuns, hidden: torch.Tensor, watch: Watch) -> None:
    for window in hidden:
        runs.log_probabilities(window, watch)


def _each(
    parts: Iterator[tuple[Part, torch.Tensor, int]], moments: Moments, chosen: Mapping[str, str], ops: CpuKernels
) -> Iterator[tuple[str, torch.Tensor]]:
    last: int | None = None  # parts of one product follow each other
    known: Inputs | None = None
    for part, rows, address in parts:
        if part.tensor not in chosen:
            continue
        if address != last:
            last, known = address, moments.inputs(address)
        yield part.tensor, _rounded(rows, part.rows, chosen[part.tensor], known, ops)


def _rounded(rows: torch.Tensor, count: int, name: str, inputs: Inputs | None, ops: CpuKernels) -> torch.Tensor:
    """The bytes of the first `count` rows of a weight [units, rows_per_unit, in_features], which becomes what they
    hold."""
    flat = rows.reshape(-1, rows.shape[-1])[:count].float()
    data = encode(name, flat, inputs)
    whole = rows.reshape(-1, rows.shape[-1]).clone()
    whole[:count] = held(name, data, flat.shape[1], ops)
    rows.copy_(whole.view(rows.shape))
    return data
