"""The layers of a model run one at a time over a text, from activations that are kept outside the model.

The text is cut into windows that stand each alone, as in `hetero_attn.tools.quality`. All windows take turns in the
memory of one: a layer writes the keys and values of a window before it reads them, so nothing of another is seen.
Weights are float32 and are multiplied by torch; what is written into them between two runs, the next one computes with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cpu_kernels.contract import Picks
from hetero_attn.engine.engine import Engine
from hetero_attn.lanes import observe
from hetero_attn.lanes.activation import Activation
from hetero_attn.models.decoder import capped, embed
from hetero_attn.models.workspace import make_buffer, make_workspace
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.ops.run import Run
from hetero_attn.ops.step import Step, make_step
from hetero_attn.ops.step_rows import Rows
from hetero_attn.spec.buffers import ActivationWidths
from hetero_attn.spec.experts import ExpertsSpec
from hetero_attn.spec.weights import LinearSpec, Part

Watch = Callable[[int, torch.Tensor], None]  # (address of a weight, the inputs that it multiplies)


class MatmulOps:
    """An engine's operations with the products of float32 weights by torch.

    watch: sees what each multiplies. features: the output features that are computed, None for all.
    """

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self.watch: Watch | None = None
        self.features: torch.Tensor | None = None

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_dtype: str,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        accumulate: bool = False,
    ) -> None:
        """As the engine's own, of plain float32 rows."""
        if self.watch is not None:
            self.watch(weight.data_ptr(), x)
        matrix = weight.view(torch.float32).view(-1, x.shape[1])
        if self.features is not None:
            matrix, bias = matrix[self.features], None if bias is None else bias[self.features]
            out = out[:, : len(matrix)]
        found = torch.nn.functional.linear(x, matrix, bias)
        if accumulate:
            out.add_(found)
        else:
            out.copy_(found)

    def expert_linear(
        self, x: torch.Tensor, picks: Picks, weight: torch.Tensor, weight_dtype: str, out: torch.Tensor
    ) -> None:
        """As the engine's own, expert by expert."""
        sources, starts, first, _ = picks
        bounds = starts[first : first + weight.shape[0] + 1].tolist()
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start < stop:
                rows = x[start:stop] if sources is None else x[sources[start:stop].long()]
                self.linear(rows, weight[expert], weight_dtype, None, out[start:stop])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


class LayerRuns:
    """Runs of a float32 engine on the CPU; made by `layer_runs`.

    windows: int64 [windows, tokens]. together: how many run as one, all rows of which a product takes at once.
    """

    def __init__(self, engine: Engine, windows: torch.Tensor, together: int, ops: MatmulOps) -> None:
        self.windows, self._together = windows, together
        self._engine, self._ops = engine, ops
        self._spec = engine.weights.spec
        self._sequences = [engine.kv_cache.open(windows.shape[1]) for _ in range(together)]
        self._steps: dict[int, Step] = {}
        self._work = make_workspace(ActivationWidths.of(self._spec), together * windows.shape[1], engine.lanes)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._spec.layers)

    def embedded(self) -> torch.Tensor:
        """What the first layer reads, float32 [windows, tokens, hidden_size]."""
        found = []
        for window in self.windows:
            residual = self._work.residual.rows(0, len(window))
            embed(self._engine.lanes, self._engine.weights, window, residual)
            found.append(residual.main[:, : self._spec.hidden_size].clone())
        return torch.stack(found)

    def after_layer(self, layer: int, hidden: torch.Tensor, watch: Watch | None = None) -> torch.Tensor:
        """What a layer leaves of `hidden`, float32 [any number of windows, tokens, hidden_size]; `watch` sees every
        product."""
        self._ops.watch = watch
        try:
            return torch.cat([self._after_layer(layer, some) for some in hidden.split(self._together)])
        finally:
            self._ops.watch = None

    def _after_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        count = hidden.shape[0]
        if count not in self._steps:
            tokens = range(hidden.shape[1])  # how many matters here, not which
            rows = [Rows(sequence, tokens, 0, is_chunk=True) for sequence in self._sequences[:count]]
            self._steps[count] = make_step(self._engine.lanes, self._engine.kv_cache, rows)
        step, work = self._steps[count], self._work.rows(0, count * hidden.shape[1])
        for sequence in self._sequences[:count]:
            self._engine.kv_cache.states.clear(sequence.id)
        residual = work.residual.main[:, : self._spec.hidden_size]
        residual.copy_(hidden.flatten(0, 1))
        run, weights = Run(self._engine.lanes, step), self._engine.weights.layers[layer]
        for block, of_block in zip(self._spec.layers[layer], weights, strict=True):
            block.forward(run, of_block, self._engine.forward.state_of(block, step), work)
        return residual.view(hidden.shape).clone()

    def log_probabilities(
        self, hidden: torch.Tensor, watch: Watch | None = None, among: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of the next token, float32 [rows, vocab_size], of what the last layer left, [rows, hidden_size]; at most
        the rows of a run. among: the tokens, int64, of which it is one, [rows, their number] then; None for all."""
        head = self._engine.weights.head
        work = self._work.rows(0, hidden.shape[0])
        work.residual.main[:, : self._spec.hidden_size].copy_(hidden)
        features = self._spec.head.linears[0].out_features
        logits: Activation = make_buffer(self._engine.lanes, hidden.shape[0], features, "resident")
        self._ops.watch, self._ops.features = watch, among
        try:
            self._spec.head.project(self._engine.lanes, head, work, logits)
        finally:
            self._ops.watch = self._ops.features = None
        count = self._spec.vocab_size if among is None else len(among)
        found = capped(logits.main[:, :count], self._engine.config.logit_cap)
        return torch.log_softmax(found, -1)

    def parts(self, layer: int) -> Iterator[tuple[Part, torch.Tensor, int]]:
        """Every weight of a layer: what it is, its rows as the model computes with them, a view float32 [units,
        rows_per_unit, in_features], and the address by which `watch` knows what it multiplies."""
        for of_block in self._engine.weights.layers[layer]:
            for linear in of_block.linears.values():
                yield from _parts(linear)

    def head_parts(self) -> Iterator[tuple[Part, torch.Tensor, int]]:
        """As `parts`, of the head."""
        for linear in self._engine.weights.head.linears.values():
            yield from _parts(linear)

    @property
    def embedding(self) -> tuple[str, torch.Tensor]:
        """The token embedding: its tensor's name, and its rows [vocab_size, hidden_size] in their own dtype."""
        return self._spec.embedding.tensor, self._engine.weights.embed

    def close(self) -> None:
        """Give the sequences back."""
        for sequence in self._sequences:
            self._engine.kv_cache.close(sequence)


def _parts(linear: LinearWeights) -> Iterator[tuple[Part, torch.Tensor, int]]:
    if not isinstance(linear.spec, ExpertsSpec):
        yield from _parts_of(linear.spec, linear.dram)
        return
    for index, data in enumerate(linear.dram):
        border = linear.spec.gate_up_bytes
        for spec, own in zip(linear.spec.expert(index), (data[:border], data[border:]), strict=True):
            yield from _parts_of(spec, own)


def _parts_of(spec: LinearSpec, data: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor, int]]:
    rows = data.view(torch.float32).view(spec.column_units, spec.unit_features, spec.in_features)
    offset = 0
    for part in spec.parts:
        yield part, rows[:, offset : offset + part.rows_per_unit], data.data_ptr()
        offset += part.rows_per_unit


def cut(tokens: Sequence[int], window_tokens: int, most_windows: int) -> torch.Tensor:
    """The first windows of a text, int64 [windows, tokens]: whole ones, or one that is shorter."""
    size = min(window_tokens, len(tokens))
    count = min(most_windows, len(tokens) // size)
    return torch.tensor(tokens[: count * size], device="cpu").view(count, size)


@contextmanager
def layer_runs(engine: Engine, windows: torch.Tensor, together: int, threads: int) -> Iterator[LayerRuns]:
    """Runs over windows of a text, `together` at a time. threads: of torch's products.

    The engine's cache must hold as many sequences of a window.
    """
    ops, before = MatmulOps(engine.lanes.host_ops), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), observe.computing_by(engine.lanes, ops):
            runs = LayerRuns(engine, windows, together, ops)
            try:
                yield runs
            finally:
                runs.close()
    finally:
        torch.set_num_threads(before)
