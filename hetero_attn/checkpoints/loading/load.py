"""Weights from the file straight into their homes.

First every linear gets its memory, which nothing is written to yet, then all are filled, one behind the other, so that
the disk never waits for the end of one. A linear is read unit by unit: a run of units is gathered from its tensors'
rows, packed, and lands in host memory or, by way of one small buffer, in GPU memory. Nothing larger than a run is ever
held twice. A tensor with a NaN or an infinity is named and refused before anything is computed with it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain

import torch

from cpu_kernels.formats import unit_bytes
from hetero_attn.checkpoints.loading.embedding import Embedding
from hetero_attn.checkpoints.loading.homes import ColumnCut, RowCut, Uncut
from hetero_attn.checkpoints.loading.landing import Landing
from hetero_attn.checkpoints.loading.numbers import Numbers
from hetero_attn.checkpoints.loading.packer import Packers
from hetero_attn.checkpoints.loading.unit_rows import Filling, UnitRows
from hetero_attn.checkpoints.sources import WeightSource
from hetero_attn.lanes.activation import Activation
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.models.block import BlockWeights
from hetero_attn.models.decoder import ModelWeights
from hetero_attn.models.rope import rope_tables
from hetero_attn.ops.linear import LinearWeights
from hetero_attn.spec.blocks import Declaration, Matrix, ModelSpec, Vector
from hetero_attn.spec.config import ModelConfig, RopeConfig
from hetero_attn.spec.experts import ExpertsSpec
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats
from hetero_attn.spec.weights import LinearSpec
from placement.plan.memory import LinearPlacement, first_dram_unit, staging_piece_units
from placement.plan.plan import Plan

MAX_PACKERS = 4  # threads that pack on their own


class Loader:
    """Loads the weights of one checkpoint by one plan. model: the blocks that they belong to.

    progress(count) is called with the number of weight bytes just placed.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        config: ModelConfig,
        model: ModelSpec,
        plan: Plan,
        weight_dtype: str | WeightFormats,
        lanes: Lanes,
        progress: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._model = model
        self._plan = plan
        self._formats = weight_formats(weight_dtype)
        self._lanes = lanes
        self._landing = Landing(checkpoint, lanes, plan.workload.weight_bytes)
        self._progress = progress
        self._numbers = Numbers(checkpoint, lanes.host_ops)
        self._unit_rows = UnitRows(checkpoint, model.packed_linears, lanes.host_ops, self._packers())
        self._placed = {
            shard.name: (shard.row_cut, placement)
            for shard, placement in zip(plan.workload.linears, plan.linears, strict=True)
        }
        self._fillings: list[Iterable[Filling]] = []  # of the linears that have memory
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (to, from), once all are filled

    def load(self) -> ModelWeights:
        """Read everything; raises CheckpointError naming the tensor that is not finite."""
        with self._landing.buffer_of(self._unit_rows.packed_bytes), closing(self._unit_rows):
            return self._load(self._model)

    def _load(self, model: ModelSpec) -> ModelWeights:
        ropes = {rope: self._rope(rope) for rope in model.ropes}
        head = self._block(model.head, ropes)
        layers = tuple(tuple(self._block(block, ropes) for block in layer) for layer in model.layers)
        fusion = None if model.fusion is None else self._block(model.fusion, ropes)
        self._fill()
        return ModelWeights(
            spec=model,
            layers=layers,
            head=head,
            embed=self._embed(model, head.linears["head"]),
            embed_format=self._formats.embed,
            fusion=fusion,
            requantised=self._landing.comparison.result(),
        )

    def _packers(self) -> Packers | None:
        """Where they are few; many would hinder each other in Python, and the team packs sooner."""
        ops = self._lanes.host_ops
        return Packers(self._checkpoint, ops) if ops.num_threads <= MAX_PACKERS else None

    def _fill(self) -> None:
        """Read and place the rows of all linears, in the order in which they got their memory."""
        for filling, start, stop, rows in self._unit_rows.runs(chain.from_iterable(self._fillings)):
            if rows is not None:
                filling.place(start, stop, rows)
            self._progress((stop - start) * filling.spec.unit_rows * filling.spec.row_bytes)
        for to, of in self._copies:
            self._lanes.copy(to, of)

    def _rope(self, rope: RopeConfig) -> tuple[Activation, Activation]:
        cos, sin = rope_tables(self._config, self._plan.max_context, rope=rope)
        return self._on_both(cos), self._on_both(sin)

    def _block(self, block: Declaration, ropes: dict[RopeConfig, tuple[Activation, Activation]]) -> BlockWeights:
        return BlockWeights(
            linears={linear.kind: self._linear(linear) for linear in block.linears},
            vectors={vector.name: self._vector(vector) for vector in block.vectors}
            | {matrix.name: self._matrix(matrix) for matrix in block.matrices},
            rope=None if block.rope is None else ropes[block.rope],
        )

    def _linear(self, spec: LinearSpec) -> LinearWeights:
        by_rows, placement = self._placed[spec.name]
        if isinstance(spec, ExpertsSpec):
            return self._experts(spec, placement)
        return self._row_cut(spec.by_rows, placement) if by_rows else self._column_cut(spec, placement)

    def _row_cut(self, spec: LinearSpec, placement: LinearPlacement) -> LinearWeights:
        """Every output feature in both homes, each with the input features of its units."""
        home, blocks = placement.gpu_units * spec.row_unit, spec.column_units * spec.unit_rows
        gpu_bytes, dram_bytes = (
            unit_bytes(spec.format, width) if width else 0 for width in (home, spec.in_features - home)
        )
        dram = self._landing.host_memory((blocks, dram_bytes), placement.streams)
        gpu = None
        if self._lanes.device is not None:
            gpu = self._lanes.device.empty((blocks, gpu_bytes), torch.uint8, "weights")
        self._fillings.append([Filling(spec, RowCut(self._landing, spec, gpu, dram, home).place, home == 0)])
        piece_bytes = self._piece_units(spec) * spec.unit_bytes
        return LinearWeights(
            spec=spec,
            placement=placement,
            gpu=gpu,
            dram=dram,
            bias=self._bias(spec),
            piece_blocks=max(1, piece_bytes // max(1, dram_bytes)),
            first_dram_unit=placement.gpu_units,
        )

    def _column_cut(self, spec: LinearSpec, placement: LinearPlacement) -> LinearWeights:
        row_bytes = unit_bytes(spec.format, spec.in_features)
        home_blocks = placement.gpu_units * spec.unit_rows
        in_dram = first_dram_unit(self._plan.workload, placement)
        may_stream = placement.streams or self._plan.workload.elastic
        dram = self._landing.host_memory(((spec.units - in_dram) * spec.unit_rows, row_bytes), may_stream)
        gpu = None
        if self._lanes.device is not None:
            gpu = self._lanes.device.empty((home_blocks, row_bytes), torch.uint8, "weights")
        place = ColumnCut(self._landing, spec, gpu, dram, in_dram).place
        self._fillings.append([Filling(spec, place, in_dram == 0)])
        if in_dram < placement.gpu_units:
            self._copies.append((gpu, dram[:home_blocks]))
        return LinearWeights(
            spec=spec,
            placement=placement,
            gpu=gpu,
            dram=dram,
            bias=self._bias(spec),
            piece_blocks=self._piece_units(spec) * spec.unit_rows,
            first_dram_unit=in_dram,
            order=self._order(spec),
        )

    def _experts(self, spec: ExpertsSpec, placement: LinearPlacement) -> LinearWeights:
        """Whole experts in both homes, gate_up and down of each behind each other."""
        in_dram = first_dram_unit(self._plan.workload, placement)
        may_stream = placement.is_copied or self._plan.workload.elastic
        dram, gpu = self._landing.host_memory((spec.experts - in_dram, spec.unit_bytes), may_stream), None
        if self._lanes.device is not None:
            gpu = self._lanes.device.empty((placement.gpu_units, spec.unit_bytes), torch.uint8, "weights")
        apart = 0 if gpu is None else min(in_dram, placement.gpu_units)
        homes = chain(
            ((index, gpu[index], True) for index in range(apart)),
            ((index, dram[index - in_dram], False) for index in range(in_dram, spec.experts)),
        )
        self._fillings.append(chain.from_iterable(self._expert(spec, *home) for home in homes))
        if in_dram < placement.gpu_units:
            self._copies.append((gpu, dram[: placement.gpu_units]))
        return LinearWeights(
            spec=spec,
            placement=placement,
            gpu=gpu,
            dram=dram,
            bias=self._expert_biases(spec),
            piece_blocks=self._piece_units(spec),
            first_dram_unit=in_dram,
        )

    def _expert(self, spec: ExpertsSpec, index: int, target: torch.Tensor, on_device: bool) -> Iterator[Filling]:
        """Of one expert; target: uint8 [unit_bytes]."""
        parts = target[: spec.gate_up_bytes], target[spec.gate_up_bytes :]
        for linear, part in zip(spec.expert(index), parts, strict=True):
            blocks = part.view(linear.units * linear.unit_rows, -1)
            home = Uncut(self._landing, linear, blocks, on_device)
            yield Filling(linear, home.place, not on_device)

    def _matrix(self, matrix: Matrix) -> Activation:
        values = torch.zeros((matrix.padded_rows, matrix.features), dtype=torch.float32, device="cpu")
        start = 0
        for tensor, rows in matrix.tensors:
            values[start : start + rows] = self._numbers.matrix(tensor)
            start += rows
        return self._on_both(values)

    def _piece_units(self, spec: LinearSpec) -> int:
        return staging_piece_units(spec.shard, self._plan.workload)

    def _expert_biases(self, spec: ExpertsSpec) -> Activation:
        if not spec.has_bias:
            return Activation(None, None)
        each = (torch.cat([self._bias_values(linear) for linear in spec.expert(i)]) for i in range(spec.experts))
        return self._on_both(torch.stack(list(each)))

    def _order(self, spec: LinearSpec) -> Activation:
        """In which order the inputs of a weight lie, int32, if not in the model's."""
        order = self._checkpoint.input_order(spec.parts[0].tensor) if spec.is_reordered else None
        return Activation(None, None) if order is None else self._on_both(order.int())

    def _bias(self, spec: LinearSpec) -> Activation:
        return self._on_both(self._bias_values(spec)) if spec.has_bias else Activation(None, None)

    def _bias_values(self, spec: LinearSpec) -> torch.Tensor:
        """The bias of every packed output feature, zero where there is none in the file."""
        rows = torch.zeros((spec.column_units, spec.unit_features), dtype=torch.float32, device="cpu")
        offset = 0
        for part in spec.parts:
            values = torch.zeros(spec.column_units * part.rows_per_unit, dtype=torch.float32, device="cpu")
            values[: part.rows] = self._numbers.vector(part.bias)
            rows[:, offset : offset + part.rows_per_unit] = values.view(spec.column_units, part.rows_per_unit)
            offset += part.rows_per_unit
        return rows.view(-1)

    def _vector(self, vector: Vector) -> Activation:
        if vector.tensor is None:
            values = torch.zeros(vector.features, dtype=torch.float32, device="cpu")
        else:
            values = self._numbers.vector(vector.tensor)
        values = -values.exp() if vector.is_log_rate else values
        values = values + vector.offset if vector.offset else values
        return self._on_both(values * vector.scale if vector.scale != 1.0 else values)

    def _embed(self, model: ModelSpec, head: LinearWeights) -> torch.Tensor:
        tensor, held_as = model.embedding.tensor, self._formats.embed
        embedding = Embedding(self._checkpoint, tensor, held_as, self._landing, self._lanes.host_ops)
        if not model.owns_embedding:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._plan.workload.embed_bytes == 0:  # a tied head in host memory: its blocks are the embedding
            return embedding.of_head(head.dram, model.hidden_size)
        return embedding.read()

    def _on_both(self, values: torch.Tensor) -> Activation:
        """The same values in host memory and, where there is a device, in its memory."""
        values = values.contiguous()
        device = self._lanes.device
        if device is None:
            return Activation(None, values)
        copy = device.empty(tuple(values.shape), values.dtype, "resident")
        device.copy(copy, values, device.compute)
        return Activation(copy, values)
