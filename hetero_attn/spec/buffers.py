"""The activation buffers of a step: how wide each is, and which lie in the same GPU memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from hetero_attn.spec.blocks import FLOAT32_BYTES, BufferSet, ModelSpec
from placement.plan.workload import round_up

RESIDUAL_ALIGN_FEATURES = 16  # output features of a linear come in whole blocks


@dataclass(frozen=True)
class ActivationWidths:
    """Widths, in float32 elements a row, of every activation buffer; the workspace allocates exactly these.

    residual: of the residual stream, and of the buffer in which columns that another lane computed arrive before they
    are added to it. sets: of every block, the widest of each; see `BufferSet`.
    """

    residual: int
    sets: tuple[BufferSet, ...]

    @classmethod
    def of(cls, model: ModelSpec) -> "ActivationWidths":
        """Widths for a model."""
        return cls(
            round_up(model.hidden_size, RESIDUAL_ALIGN_FEATURES),
            widest_sets((*model.kept, *(each for block in model.blocks for each in block.buffers))),
        )

    @property
    def by_name(self) -> dict[str, int]:
        """Width of every buffer of the blocks."""
        return dict(buffer for each in self.sets for buffer in each.buffers)

    @property
    def regions(self) -> dict[str, tuple[BufferSet, ...]]:
        """The sets of every region."""
        found: dict[str, tuple[BufferSet, ...]] = {}
        for each in self.sets:
            found[each.region] = (*found.get(each.region, ()), each)
        return found

    @property
    def bytes_per_row(self) -> int:
        """Bytes of GPU memory for one token row."""
        return FLOAT32_BYTES * (2 * self.residual + sum(map(room, self.regions.values())))

    @property
    def host_bytes_per_row(self) -> int:
        """Bytes of host memory for one token row, where every buffer has its own."""
        return FLOAT32_BYTES * (2 * self.residual + sum(self.by_name.values()))


def room(sets: Iterable[BufferSet]) -> int:
    """Elements a row of GPU memory for a region."""
    return max(sum(width for _, width in each.buffers) for each in sets)


def widest_sets(sets: Iterable[BufferSet]) -> tuple[BufferSet, ...]:
    """One set for all of the same buffers, with the greatest width of each.

    Raises ValueError for a buffer in two sets of different names or regions: it would have two places.
    """
    merged: dict[tuple[str, ...], BufferSet] = {}
    place: dict[str, tuple[str, ...]] = {}
    for each in sets:
        names = tuple(name for name, _ in each.buffers)
        for name in names:
            if place.setdefault(name, (each.region, *names)) != (each.region, *names):
                raise ValueError(
                    f"buffer {name} is in a set {names} of region {each.region}, and in {place[name]} elsewhere; "
                    "give it another name"
                )
        known = merged.get(names, each)
        widths = (max(a, b) for (_, a), (_, b) in zip(known.buffers, each.buffers, strict=True))
        merged[names] = BufferSet(each.region, tuple(zip(names, widths, strict=True)))
    return tuple(merged.values())
