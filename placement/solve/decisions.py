"""What goes into and comes out of one program: budgets, passes, decisions already taken, and the totals it finds."""

from dataclasses import dataclass

from placement.plan.shards import KvShard
from placement.plan.workload import Workload
from placement.policy.bounds import KvBounds


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits in bytes beside everything of fixed size. host includes pinned; None is no limit."""

    gpu: float
    pinned: float | None = None
    host: float | None = None


@dataclass(frozen=True, slots=True)
class Homes:
    """Decisions shared by all row tiers: gpu units by (class, linear), KV heads of the GPU by class, which linears are
    pinned and may stream, and the staging slot in bytes."""

    gpu_units: dict[tuple[int, int], int]
    gpu_kv_heads: dict[int, int]
    streaming: frozenset[tuple[int, int]]
    staging_slot_bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """A solution by class: units over all layers of the class, before they are spread over layers.

    gpu: by (class, linear); stream, cpu_layers (those with a CPU share): by (class, linear, tier); kv_heads,
    attending_layers (those with CPU attention): by class; gpu_tokens: KV slots that a GPU-owned KV head
    keeps in GPU memory, in whole pages; seconds: of the passes, were nothing rounded.
    """

    gpu: dict[tuple[int, int], float]
    stream: dict[tuple[int, int, int], float]
    cpu_layers: dict[tuple[int, int, int], float]
    kv_heads: dict[int, float]
    attending_layers: dict[int, float]
    gpu_tokens: int
    seconds: float


def gpu_tokens_of(workload: Workload, shard: KvShard, bounds: KvBounds, gpu_tokens: int) -> int:
    """KV slots that a GPU-owned KV head of a layer keeps in GPU memory: the policy's, else `gpu_tokens`.

    The layers of a sliding window keep no more than they ever hold.
    """
    return min(bounds.gpu_tokens or gpu_tokens, workload.layer_tokens(shard))
