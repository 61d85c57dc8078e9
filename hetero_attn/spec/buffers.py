"""The activation buffers of a step: how wide each is, and which lie in the same GPU memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from hetero_attn.spec.blocks import FLOAT32_BYTES, BufferGroup, ModelSpec
from placement.plan.workload import round_up

RESIDUAL_ALIGN_FEATURES = 16  # output features of a linear come in whole blocks


@dataclass(frozen=True)
class ActivationWidths:
    """Widths, in float32 elements a row, of every activation buffer; the workspace allocates exactly these.

    residual: of the residual stream, and of the buffer in which columns that another lane computed arrive before they
    are added to it. groups: of every block, the widest of each; see `BufferGroup`.
    """

    residual: int
    groups: tuple[BufferGroup, ...]

    @classmethod
    def of(cls, model: ModelSpec) -> "ActivationWidths":
        """Widths for a model."""
        return cls(
            round_up(model.hidden_size, RESIDUAL_ALIGN_FEATURES),
            widest_groups(group for block in model.blocks for group in block.buffers),
        )

    @property
    def by_name(self) -> dict[str, int]:
        """Width of every buffer of the blocks."""
        return dict(buffer for group in self.groups for buffer in group.buffers)

    @property
    def regions(self) -> dict[str, tuple[BufferGroup, ...]]:
        """The groups of every region."""
        found: dict[str, tuple[BufferGroup, ...]] = {}
        for group in self.groups:
            found[group.region] = (*found.get(group.region, ()), group)
        return found

    @property
    def bytes_per_row(self) -> int:
        """Bytes of GPU memory for one token row."""
        return FLOAT32_BYTES * (2 * self.residual + sum(map(room, self.regions.values())))

    @property
    def host_bytes_per_row(self) -> int:
        """Bytes of host memory for one token row, where every buffer has its own."""
        return FLOAT32_BYTES * (2 * self.residual + sum(self.by_name.values()))


def room(groups: Iterable[BufferGroup]) -> int:
    """Elements a row of GPU memory for a region."""
    return max(sum(width for _, width in group.buffers) for group in groups)


def widest_groups(groups: Iterable[BufferGroup]) -> tuple[BufferGroup, ...]:
    """One group for all of the same buffers, with the greatest width of each.

    Raises ValueError for a buffer in two groups of different names or regions: it would have two places.
    """
    merged: dict[tuple[str, ...], BufferGroup] = {}
    place: dict[str, tuple[str, ...]] = {}
    for group in groups:
        names = tuple(name for name, _ in group.buffers)
        for name in names:
            if place.setdefault(name, (group.region, *names)) != (group.region, *names):
                raise ValueError(
                    f"buffer {name} is in a group {names} of region {group.region}, and in {place[name]} elsewhere; "
                    "give it another name"
                )
        known = merged.get(names, group)
        widths = (max(a, b) for (_, a), (_, b) in zip(known.buffers, group.buffers, strict=True))
        merged[names] = BufferGroup(group.region, tuple(zip(names, widths, strict=True)))
    return tuple(merged.values())
