"""What a GPU, its copy engine, the host worker and the calling thread are given, kept lane by lane in their order.

The lanes' own code runs on a driver, CPU kernels and a host worker that compute nothing (`recording_driver`,
`recorded_ops`) as it runs on a GPU, so what is kept is what a GPU would be given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

MAIN, GPU, COPIES, CPU = LANES = ("main thread", "GPU compute", "copies", "CPU lane")


class Region(NamedTuple):
    """Bytes of one allocation: `rows` runs of `width` bytes, `pitch` apart, from `start` on."""

    storage: int
    start: int
    width: int
    pitch: int
    rows: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Region":
        """Where a tensor lies; of more than rows with a pitch, all from its first byte to its last."""
        size, start = tensor.itemsize, tensor.storage_offset() * tensor.itemsize
        storage = tensor.untyped_storage()._cdata
        if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
            return cls(storage, start, tensor.shape[1] * size, tensor.stride(0) * size, tensor.shape[0])
        extent = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(storage, start, (extent + 1) * size, (extent + 1) * size, 1)

    def meets(self, other: "Region") -> bool:
        """Whether both have a byte in common; of equal pitches exactly, else by their extents."""
        if self.start >= other.stop or other.start >= self.stop:
            return False
        if self.pitch != other.pitch or self.start // self.pitch != other.start // other.pitch:
            return True
        first, second = self.start % self.pitch, other.start % self.pitch
        return first < second + other.width and second < first + self.width

    @property
    def stop(self) -> int:
        """The byte behind the last one."""
        return self.start + (self.rows - 1) * self.pitch + self.width


@dataclass(slots=True, eq=False)
class Entry:
    """One thing that a lane does. kind: work | post (say that `key` is reached) | await (go on once it is).

    operation, arguments: of work, for its duration. issued: how many entries of the main thread come before this one
    can begin; of the main thread's own, 0. replayed: queued with a whole captured step.
    """

    lane: str
    kind: str
    name: str
    issued: int = 0
    key: Any = None
    operation: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    replayed: bool = False


class Recording:
    """Entries by lane in the order each lane has them. names: of allocations that are a shard's."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[Entry]] = {lane: [] for lane in LANES}
        self.target: list[Entry] | None = None
        self.names: dict[int, str] = {}
        self._keeps: list[Any] = []
        self._arrived: dict[Region, str] = {}

    def clear(self) -> None:
        """Forget all entries."""
        self.lanes = {lane: [] for lane in LANES}
        self._keeps.clear()

    def work(self, lane: str, operation: str, arguments: dict[str, Any], reads: list, writes: list) -> None:
        """Keep an operation, its name being that of what it reads; on a GPU's lane the main thread queues it."""
        self._keeps.append((reads, writes))  # an allocation that is gone may be taken for another
        read, written = (
            tuple(Region.of(tensor) for tensor in tensors if tensor.numel()) for tensors in (reads, writes)
        )
        shard = next((self.names[region.storage] for region in read if region.storage in self.names), "")
        if lane == COPIES and shard:
            self._arrived[written[0]] = shard  # who reads the buffer reads this
        shard = shard or next((self._arrived[region] for region in read if region in self._arrived), "")
        self._add(Entry(lane, "work", f"{operation} {shard}".rstrip(), 0, None, operation, arguments, read, written))

    def post(self, lane: str, key: Any, name: str) -> None:
        """Keep that a lane reaches `key`."""
        self._add(Entry(lane, "post", name, key=key))

    def wait(self, lane: str, key: Any, name: str) -> None:
        """Keep that a lane waits for `key`."""
        self._add(Entry(lane, "await", name, key=key))

    def replay(self, entries: list[Entry], name: str) -> None:
        """What was captured is queued at once."""
        self._add(Entry(MAIN, "work", name, operation="launch"))
        issued = len(self.lanes[MAIN])
        for entry in entries:
            entry.issued, entry.replayed = issued, True
            self.lanes[entry.lane].append(entry)

    @contextmanager
    def into(self, entries: list[Entry]) -> Iterator[None]:
        """Keep entries here instead, as a capture does."""
        kept, self.target = self.target, entries
        try:
            yield
        finally:
            self.target = kept

    def _add(self, entry: Entry) -> None:
        if self.target is not None:
            self.target.append(entry)
            return
        if entry.lane in (GPU, COPIES):
            name, about = f"queue {entry.name}", {"of": entry}
            self.lanes[MAIN].append(Entry(MAIN, "work", name, operation="queue", arguments=about))
        entry.issued = len(self.lanes[MAIN]) if entry.lane != MAIN else 0
        self.lanes[entry.lane].append(entry)
