"""What a layer is run with: a step on its lanes, and the layer's keys and values in that step."""

from typing import NamedTuple

from hetero_attn.cache.pool import CachePool
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.ops.step import PoolStep, Step


class Run(NamedTuple):
    """A step on its lanes."""

    lanes: Lanes
    step: Step


class KvView(NamedTuple):
    """One layer's keys and values in a step: their pool, the layer's place in it, and the step's segments."""

    pool: CachePool
    place: int
    segments: PoolStep
