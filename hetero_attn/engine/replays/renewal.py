"""The next step of the CPU lane written over the one that a recorded program reads, in place.

`make_step` says the same in new tensors, which a recording would have to copy. Python's code is out of the caches after
every step, which has read all weights, so that each call of torch costs 5 to 15 us: some twenty of them took as long as
an attention block of a small model.
"""

from collections.abc import Sequence

from cpu_kernels.contract import RowKeys
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.pool import CachePool
from hetero_attn.ops.step import PoolStep, Step
from hetero_attn.ops.step_rows import Rows


class _PoolArrays:
    """What a step says of one pool, row by row, and whose line of the page table each row has."""

    def __init__(self, pool: PoolStep) -> None:
        (part,) = pool.parts
        keys = part.host
        assert isinstance(keys, RowKeys) and part.recent is None and part.spilled is None, (
            "a step of the CPU lane alone"
        )
        self._slots, self._tables = tuple(pool.slots.host.numpy()), tuple(keys.table.numpy())
        self._start, self._stop = keys.start.numpy(), keys.stop.numpy()
        self.forget()

    def forget(self) -> None:
        """Somebody else has written the tables."""
        self._lines: list[tuple[int, int] | None] = [None] * len(self._slots)

    def write(self, row: int, pool: CachePool, sequence_id: int, position: int) -> None:
        """A row that is a sequence's token at `position`."""
        store = pool.host
        store.write_slots(sequence_id, position, self._slots[row])
        self._start[row], self._stop[row] = pool.first_visible(position), position + 1
        line = sequence_id, store.placed(sequence_id)
        if self._lines[row] != line:
            store.write_table(sequence_id, self._tables[row])
            self._lines[row] = line


class Renewal:
    """Writes steps over one of the CPU lane whose rows attend one by one, and as many as there."""

    def __init__(self, step: Step) -> None:
        self._token_ids, self._positions = step.token_ids.numpy(), step.positions.host.numpy()
        ids, self._has_drafts = step.sequence_ids.host, step.has_drafts
        self._sequence_ids = None if ids is None else ids.numpy()
        self._pools = [_PoolArrays(pool) for pool in step.pools]

    def forget(self) -> None:
        """Somebody else has written the step."""
        for arrays in self._pools:
            arrays.forget()

    def write(self, cache: KVCache, work: Sequence[Rows]) -> None:
        """As `make_step` of the same work: holds pages for its tokens, too."""
        row = 0
        for sequence, token_ids, *_ in work:
            cache.make_room(sequence, len(token_ids))
            for position, token_id in enumerate(token_ids, sequence.length):
                self._token_ids[row], self._positions[row] = token_id, position
                if self._sequence_ids is not None:
                    is_draft = self._has_drafts and position > sequence.length
                    self._sequence_ids[row] = ~sequence.id if is_draft else sequence.id
                for pool, arrays in zip(cache.pools, self._pools, strict=True):
                    arrays.write(row, pool, sequence.id, position)
                row += 1
