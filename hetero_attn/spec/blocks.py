"""What a model says of itself: a list of blocks, each with its linears, vectors, state and buffers, said once.

Expected tensors, activation buffers, the workload, the loader and the planner's counts are read off these declarations.
What a block computes is in `hetero_attn.models`; nothing here knows a tensor or a device.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from hetero_attn.spec.config import RopeConfig
from hetero_attn.spec.weights import LinearSpec

FLOAT32_BYTES = 4
KEPT = "kept"  # the buffer, and the region, of the residual streams that are kept for a head that drafts


@dataclass(frozen=True, slots=True)
class Vector:
    """A float32 vector of a block, such as a norm's weight. offset, scale: what the checkpoint holds counts as
    (values + offset) * scale; is_log_rate: as -exp(values) instead. tensor: None where no checkpoint holds it, whose
    values count as zeros."""

    name: str
    tensor: str | None
    features: int
    offset: float = 0.0
    scale: float = 1.0
    is_log_rate: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """A float32 matrix of a block, its tensors one below the other, (name, rows), then zeros to `padded_rows`.

    Unlike a linear it is whole wherever the residual stream lives, and its products round nothing: a router.
    """

    name: str
    tensors: tuple[tuple[str, int], ...]
    features: int
    padded_rows: int


@dataclass(frozen=True, slots=True)
class KvState:
    """Keys and values of every token. window: how many newest tokens are seen, 0 for all."""

    kv_heads: int
    heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class FixedState:
    """float32 values of this shape for every sequence, however long it is; zeros at its start. draft_features: as of
    `StateShard`."""

    shape: tuple[int, ...]
    draft_features: int = 0

    @property
    def bytes_per_sequence(self) -> int:
        """What one sequence takes."""
        return FLOAT32_BYTES * prod(self.shape)


@dataclass(frozen=True, slots=True)
class BufferSet:
    """Activation buffers of a step, (name, float32 elements a row), that lie one behind the other in a region of GPU
    memory.

    The sets of a region never live together: each may begin where the others do. What one block leaves in a buffer
    no other block may rely on. Every access on the GPU is in the order of one stream; host memory is not shared.
    """

    region: str
    buffers: tuple[tuple[str, int], ...]


class Declaration:
    """What one block of a model is; `models.block.Block` adds what it computes.

    kind: what it is called in its layer. linears: in the order they run. small_calls: operations of a step beside
    linears and attention. rope: the rotary tables that it reads. stored: the buffer whose rows its cache takes.
    records: whether a decode step of it may be recorded: on the CPU that asks that all it computes are operations of
    the CPU kernels, which torch's own are not. reorders: whether it brings rows into the order in which a linear has
    its inputs, where that is not the model's.
    """

    kind: str
    layer: int | None
    linears: tuple[LinearSpec, ...] = ()
    vectors: tuple[Vector, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    state: KvState | FixedState | None = None
    buffers: tuple[BufferSet, ...] = ()
    small_calls: int = 0
    rope: RopeConfig | None = None
    stored: str | None = None
    records: bool = True
    reorders: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that it is made of, name -> shape."""
        found: dict[str, tuple[int, ...]] = {}
        for linear in self.linears:
            found |= linear.tensors
        for matrix in self.matrices:
            found |= {name: (rows, matrix.features) for name, rows in matrix.tensors}
        vectors = {vector.tensor: (vector.features,) for vector in self.vectors if vector.tensor is not None}
        return found | vectors


@dataclass(frozen=True)
class ModelSpec:
    """A model as its blocks: the token embedding, those of every layer, and the head.

    embedding: its tensor and shape; the rows that it gives are multiplied by embedding_scale. layers, head: each block
    is a `Declaration`, and where it is to be computed a `models.block.Block`, which this floor does not know.
    spare_layers: as in `ModelConfig`. fusion: the block of a head that drafts which makes its rows of what a larger
    model computed, in passes of its own; None for a model. taps: before which layers the residual stream is kept for
    such a head. owns_embedding: whether the files have the token embedding, else a larger model's serves.
    spare_tensors: what files may have beside what is declared.
    """

    embedding: Vector
    vocab_size: int
    embedding_scale: float
    layers: tuple[tuple[Any, ...], ...]
    head: Any
    spare_layers: int = 0
    fusion: Any = None
    taps: tuple[int, ...] = ()
    owns_embedding: bool = True
    spare_tensors: tuple[str, ...] = ()

    @cached_property
    def blocks(self) -> tuple[Declaration, ...]:
        """What makes the rows of a head that drafts, every block of every layer, and the head, in the order they
        run."""
        first = () if self.fusion is None else (self.fusion,)
        return (*first, *(block for layer in self.layers for block in layer), self.head)

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear in the order a forward pass runs them."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def packed_linears(self) -> tuple[LinearSpec, ...]:
        """The linears as they are packed: in the place of a layer's experts the two of the first one."""
        return tuple(each for linear in self.linears for each in linear.packed)

    @property
    def resident_features(self) -> int:
        """Numbers of all vectors and matrices together."""
        vectors = sum(vector.features for block in self.blocks for vector in block.vectors)
        return vectors + sum(m.padded_rows * m.features for block in self.blocks for m in block.matrices)

    @cached_property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Every different set of rotary tables."""
        return tuple(dict.fromkeys(block.rope for block in self.blocks if block.rope is not None))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.embedding.features

    @property
    def is_tied(self) -> bool:
        """Whether the head multiplies by the token embedding."""
        return self.head.linears[0].parts[0].tensor == self.embedding.tensor

    @property
    def kept(self) -> tuple[BufferSet, ...]:
        """Buffers that no block has: the residual streams at the taps, side by side."""
        width = len(self.taps) * self.hidden_size
        return (BufferSet(KEPT, ((KEPT, width),)),) if self.taps else ()

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the model must have, name -> shape; weights are [out_features, in_features]."""
        own = {self.embedding.tensor: (self.vocab_size, self.hidden_size)} if self.owns_embedding else {}
        found = own | self.head.tensors
        for block in self.blocks:
            found |= block.tensors
        return found
