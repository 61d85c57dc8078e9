"""A step's tables on their way to the device: every layout has its own views, and a decode step few calls of torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hetero_attn.cache.cache import KVCache
from hetero_attn.devices import Device, EmulatedDriver
from hetero_attn.lanes.tables import LAYOUTS, StepTables
from hetero_attn.ops.step import make_step
from hetero_attn.ops.step_rows import Rows
from tests.support.models.runtime import make_engine, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


def numbered(rows: int, start: int) -> list[torch.Tensor]:
    return [torch.arange(start, start + rows), torch.arange(start, start + 2 * rows, dtype=torch.int32).view(rows, 2)]


def test_tables_arrive_whatever_layouts_came_before():
    tables = StepTables(Device(EmulatedDriver()), 1 << 14)

    for start, rows in enumerate([1, 3, 1, *range(4, 4 + 2 * LAYOUTS), 3, 1]):
        sent = numbered(rows, start)
        arrived = tables.upload(sent)

        assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(arrived, sent, strict=True))
    assert len(tables._views) <= LAYOUTS


def test_tables_of_one_layout_land_in_one_place():
    tables = StepTables(Device(EmulatedDriver()), 1 << 12)
    places = [[table.data_ptr() for table in tables.upload(numbered(rows, rows))] for rows in (2, 5, 2)]

    assert places[0] == places[2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("toy"), "llama", layers=2)
    engine = make_engine(path, uniform_plan(toy_workload(path), gpu=0.5, stream=0.2, gpu_kv_heads=1))
    yield engine
    engine.close()


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def opened(cache: KVCache, length: int):
    sequence = cache.open()
    cache.make_room(sequence, length)
    sequence.length = length
    return sequence


def test_a_decode_step_finds_each_sequence_where_it_would_alone(engine):
    cache = engine.kv_cache
    sequences = [opened(cache, length) for length in (7, 16)]
    together = make_step(engine.lanes, cache, [Rows(sequence, [5]) for sequence in sequences])
    slots = [pool.slots.host.clone() for pool in together.pools]
    positions = together.positions.device.tolist()
    for row, sequence in enumerate(sequences):
        alone = make_step(engine.lanes, cache, [Rows(sequence, [5])])
        page, offset = divmod(sequence.length, cache.pools[0].host.page_size)
        store = cache.pools[0].host
        expected = store.table[sequence.id, :, page].long() * store.page_size + offset

        assert positions[row] == sequence.length
        assert torch.equal(alone.pools[0].slots.host[0], slots[0][row])
        assert torch.equal(slots[0][row], expected)
        cache.close(sequence)


def test_planning_a_decode_step_is_few_calls_of_torch(engine):
    cache = engine.kv_cache
    sequence = opened(cache, 9)
    make_step(engine.lanes, cache, [Rows(sequence, [5])])

    with Calls() as calls:
        make_step(engine.lanes, cache, [Rows(sequence, [5])])

    cache.close(sequence)
    assert calls.count <= 30  # in two stores; 84 where views and positions were made anew for every table
