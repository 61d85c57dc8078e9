"""What a linear layer is: one declaration that sizes a plan, loads a file and lays out packed units.

A linear layer is a run of *units*, the smallest pieces that a cut may separate. Each unit gathers rows of one or more
checkpoint tensors (its *parts*) and is padded to whole blocks of output features:

    qkv      one unit per KV head         [its q heads | k head | v head]
    gate_up  16 gate rows, then the 16 up rows beside them
    o, down, head   16 rows

In a *paired* block the last linear (`o`, `down`) is cut the other way, by input feature, so that each side goes on with
the heads and neurons that it has computed and adds one partial sum: a unit is a KV head's heads, or 64 neurons.

This module knows names and sizes; it reads nothing and knows no device.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from cpu_kernels.formats import BLOCK_FEATURES, GROUP_INPUTS, format_of, mix_name, unit_blocks, unit_bytes
from hetero_attn.errors import UnsupportedModelError
from placement.plan.shards import LinearShard
from placement.plan.workload import round_up


@dataclass(frozen=True, slots=True)
class Part:
    """`rows_per_unit` consecutive rows of one checkpoint tensor go into every unit; `rows` is the tensor's total.

    format: the name of the format that they are held in. reordered: whether their inputs lie in another order than the
    model's, as GPTQ's act-order leaves them.
    """

    tensor: str
    rows_per_unit: int
    rows: int
    format: str
    reordered: bool = False

    @property
    def bias(self) -> str:
        """Name of the bias tensor that belongs to this weight."""
        return self.tensor.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer as a run of units.

    `out_features` counts packed features, padding included; `in_features` is the checkpoint's own. block: of the layer,
    to which it belongs. row_unit: input features of a unit where the linear is cut by rows of `x @ W`, 0 where it is
    cut by columns. row_choice: the row_unit that a paired plan would give it, 0 where none can. per_kv_head: its units
    are the KV heads of the layer's cache.
    """

    name: str
    kind: str
    layer: int | None
    in_features: int
    parts: tuple[Part, ...]
    has_bias: bool
    row_unit: int = 0
    block: str = ""
    row_choice: int = 0
    per_kv_head: bool = False

    @cached_property
    def is_reordered(self) -> bool:
        """Whether what it multiplies is brought into the order of its inputs first, which all its parts have alike."""
        return self.parts[0].reordered

    @cached_property
    def by_rows(self) -> "LinearSpec | None":
        """The same linear as a paired plan cuts it; None where its units do not fall on whole superblocks, or its
        inputs lie in another order."""
        unit = self.row_choice
        whole = max(GROUP_INPUTS, *(format_of(part.format).group_inputs for part in self.parts))
        if self.is_reordered or unit == 0 or unit % whole or self.in_features % unit:
            return None
        return replace(self, row_unit=unit)

    @property
    def packed(self) -> "tuple[LinearSpec, ...]":
        """What is packed at a time: the linear."""
        return (self,)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of its bias, if it has one."""
        return (self.out_features,)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that it is made of, name -> shape, biases included."""
        found: dict[str, tuple[int, ...]] = {part.tensor: (part.rows, self.in_features) for part in self.parts}
        return found | ({part.bias: (part.rows,) for part in self.parts} if self.has_bias else {})

    @cached_property
    def runs(self) -> tuple[tuple[str, tuple[Part, ...]], ...]:
        """Neighbouring parts of one format: (format, parts), in order."""
        return tuple((name, tuple(parts)) for name, parts in groupby(self.parts, key=lambda part: part.format))

    @cached_property
    def format(self) -> str:
        """The format of all parts, or the mix of them."""
        if len(self.runs) == 1:
            return self.parts[0].format
        rows = [(name, sum(part.rows_per_unit for part in parts)) for name, parts in self.runs]
        if odd := [name for name, count in rows[:-1] if count % BLOCK_FEATURES]:
            raise UnsupportedModelError(
                f"{self.name} mixes formats ({', '.join(name for name, _ in rows)}), and its part in {odd[0]} is no "
                f"whole number of {BLOCK_FEATURES} rows a unit; ask for one dtype, such as q8"
            )
        return mix_name([(name, -(-count // BLOCK_FEATURES)) for name, count in rows])

    @cached_property
    def unit_features(self) -> int:
        """Packed output features of one column unit, a multiple of the kernels' block."""
        return round_up(sum(part.rows_per_unit for part in self.parts), BLOCK_FEATURES)

    @cached_property
    def row_features(self) -> int:
        """Output features of one row of the packed weight: a block's, or of a mix those of a whole unit."""
        return BLOCK_FEATURES * unit_blocks(self.format)

    @cached_property
    def unit_rows(self) -> int:
        """Rows of the packed weight in one column unit."""
        return self.unit_features // self.row_features

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the packed weight of a column cut."""
        return unit_bytes(self.format, self.in_features)

    @cached_property
    def column_units(self) -> int:
        """Number of runs of output features that are gathered and packed together."""
        return -(-self.parts[0].rows // self.parts[0].rows_per_unit)

    @cached_property
    def units(self) -> int:
        """Number of units that a cut may separate."""
        return self.in_features // self.row_unit if self.row_unit else self.column_units

    @cached_property
    def out_features(self) -> int:
        """Packed output features of the whole linear, padding included."""
        return self.column_units * self.unit_features

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one packed unit."""
        if self.row_unit:
            return self.column_units * self.unit_rows * unit_bytes(self.format, self.row_unit)
        return self.unit_rows * unit_bytes(self.format, self.in_features)

    @cached_property
    def shard(self) -> LinearShard:
        """This linear as the planner sees it."""
        return LinearShard(
            name=self.name,
            kind=self.kind,
            layer=self.layer,
            units=self.units,
            unit_bytes=self.unit_bytes,
            unit_features=-(-self.out_features // self.units),
            in_features=self.in_features,
            flops_per_row_per_unit=2 * self.out_features * self.in_features // self.units,
            row_cut=self.row_unit > 0,
            weight_format=self.format,
            block=self.block,
            per_kv_head=self.per_kv_head,
        )
