"""A layer's experts as one linear whose units are whole experts: the pieces that a cut may separate.

An expert is one contiguous run of packed bytes, [gate_up blocks | down blocks], each laid out as that linear would be
by itself; all experts of a layer follow each other in one tensor, so that an address is a base and an id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cpu_kernels.formats import BLOCK_FEATURES, segments
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.experts_config import ExpertsConfig
from hetero_attn.spec.tensor_names import expert_tensor
from hetero_attn.spec.weights import LinearSpec, Part
from placement.plan.shards import LinearShard


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(LinearSpec):
    """All routed experts of a layer; `parts` are those of the first one and stand for all.

    experts: how many there are; per_row: how many a row is computed by; width: neurons of one; activation: the
    operation between its products; clamp: as in `ExpertsConfig`. `unit_features` counts the output features that a row
    gets back from an expert, on average over all.
    """

    layer: int
    experts: int
    per_row: int
    width: int
    activation: str = "silu_mul"
    clamp: tuple[float, float] | None = None

    def expert(self, index: int) -> tuple[LinearSpec, LinearSpec]:
        """gate_up and down of one expert."""
        gate, up, down = (
            Part(expert_tensor(self.layer, index, name), BLOCK_FEATURES, rows, part.format)
            for name, rows, part in zip(
                ("gate", "up", "down"), (self.width, self.width, self.in_features), self.parts, strict=True
            )
        )
        name = f"{self.name}.{index}"
        return (
            LinearSpec(f"{name}.gate_up", "gate_up", self.layer, self.in_features, (gate, up), self.has_bias),
            LinearSpec(f"{name}.down", "down", self.layer, self.width, (down,), self.has_bias),
        )

    def routes_size(self, rows: int, copied: int = 0) -> int:
        """Numbers in the `Routes` of some rows beside so many copies of experts, their weights apart."""
        return 3 * rows * self.per_row + copied + self.experts + 1

    @cached_property
    def first(self) -> tuple[LinearSpec, LinearSpec]:
        """gate_up and down of the first expert, as large as those of any."""
        return self.expert(0)

    @property
    def packed(self) -> tuple[LinearSpec, ...]:
        """Experts are packed one at a time."""
        return self.first

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Of every expert the bias of gate_up, then that of down."""
        return (self.experts, sum(linear.out_features for linear in self.first))

    @property
    def by_rows(self) -> None:
        """Experts are cut between each other only."""
        return None

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors of all experts, name -> shape."""
        found: dict[str, tuple[int, ...]] = {}
        for index in range(self.experts):
            for linear in self.expert(index):
                found |= linear.tensors
        return found

    @cached_property
    def format(self) -> str:
        """What gate and up are held in; it may not be what down is."""
        return self.first[0].format

    @cached_property
    def has_same_bits(self) -> bool:
        """Whether every lane computes the same bits: where codes are whole numbers (gpu_kernels/experts/ordered.py)."""
        formats = {each.format for linear in self.first for each in segments(linear.format, linear.in_features)}
        return not any(each.is_row_major or each.has_float_codes for each in formats)

    @cached_property
    def gate_up_bytes(self) -> int:
        """Packed bytes of an expert's gate_up, which its down follows."""
        return self.first[0].units * self.first[0].unit_bytes

    @cached_property
    def unit_bytes(self) -> int:
        """Packed bytes of one expert."""
        return self.gate_up_bytes + self.first[1].units * self.first[1].unit_bytes

    @property
    def units(self) -> int:
        """Every expert is a unit."""
        return self.experts

    @property
    def column_units(self) -> int:
        """Every expert is a unit of what lies in one piece, too."""
        return self.experts

    @property
    def unit_rows(self) -> int:
        """The packed weight has a row for each expert."""
        return 1

    @property
    def row_bytes(self) -> int:
        """Packed bytes of one row, which is one expert."""
        return self.unit_bytes

    @cached_property
    def unit_features(self) -> int:
        """Output features that one expert stands for, so that all of them cost what a row's experts do."""
        return -(-self.per_row * self.first[1].out_features // self.experts)

    @property
    def out_features(self) -> int:
        """Features that a row gets back."""
        return self.units * self.unit_features

    @cached_property
    def shard(self) -> LinearShard:
        """The experts as the planner sees them."""
        return LinearShard(
            name=self.name,
            kind=self.kind,
            layer=self.layer,
            units=self.units,
            unit_bytes=self.unit_bytes,
            unit_features=self.unit_features,
            in_features=self.in_features,
            flops_per_row_per_unit=sum(2 * linear.out_features * linear.in_features for linear in self.first),
            weight_format=self.format,
            block=self.block,
            picks=self.per_row,
            same_bits=self.has_same_bits,
            down_format=self.first[1].format if self.first[1].format != self.format else "",
        )


def experts_spec(
    config: ExpertsConfig, hidden_size: int, layer: int, format_of_tensor: Callable[[str], str], activation: str
) -> ExpertsSpec:
    """The experts of a layer. format_of_tensor(name): in what a tensor is held. activation: the operation of the
    model's MLP.

    Raises UnsupportedModelError where a part of one expert is held otherwise than that of the first: all experts of a
    layer lie in one piece, of equal size.
    """
    for name in ("gate", "up", "down"):
        first = format_of_tensor(expert_tensor(layer, 0, name))
        for index in range(1, config.experts):
            if (found := format_of_tensor(expert_tensor(layer, index, name))) != first:
                raise UnsupportedModelError(
                    f"layers.{layer}.experts: {name} of expert {index} is {found} and that of expert 0 {first}; the "
                    "experts of a layer are held in one format, so ask for one dtype, such as q8"
                )
    rows = {"gate": config.width, "up": config.width, "down": hidden_size}
    parts = tuple(
        Part(expert_tensor(layer, 0, name), BLOCK_FEATURES, count, format_of_tensor(expert_tensor(layer, 0, name)))
        for name, count in rows.items()
    )
    return ExpertsSpec(
        name=f"layers.{layer}.experts",
        kind="experts",
        layer=layer,
        in_features=hidden_size,
        parts=parts,
        has_bias=config.has_bias,
        block="experts",
        experts=config.experts,
        per_row=config.per_row,
        width=config.width,
        activation=activation,
        clamp=config.clamp,
    )
