"""Which widths of every shard the rules of a policy fix, and which are free."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.plan.memory import KvPlacement, LinearPlacement
from placement.plan.workload import NUM_ROW_TIERS


@dataclass(frozen=True, slots=True)
class LinearBounds:
    """Widths of one linear in units. None is free; stream and cpu are per row tier. Where expert_slots is None and
    every width is fixed, there are none."""

    gpu: int | None = None
    stream: tuple[int | None, ...] = (None,) * NUM_ROW_TIERS
    cpu: tuple[int | None, ...] = (None,) * NUM_ROW_TIERS
    expert_slots: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether nothing is left to choose."""
        return self.gpu is not None and None not in self.stream

    def allows(self, placement: LinearPlacement) -> bool:
        """Whether a placement has every width that is fixed."""
        if self is FREE or self == FREE:
            return True
        if self.expert_slots not in (None, placement.expert_slots):
            return False
        wanted = ((self.gpu, stream, cpu) for stream, cpu in zip(self.stream, self.cpu, strict=True))
        return all(
            want is None or want == has
            for tier, wants in enumerate(wanted)
            for want, has in zip(wants, placement.cut(tier), strict=True)
        )


FREE = LinearBounds()


@dataclass(frozen=True, slots=True)
class KvBounds:
    """GPU-owned KV heads of one layer and KV slots they keep in GPU memory. None is free."""

    gpu_kv_heads: int | None = None
    gpu_tokens: int | None = None

    def allows(self, placement: KvPlacement) -> bool:
        """Whether a placement has what is fixed."""
        heads_fit = self.gpu_kv_heads is None or self.gpu_kv_heads == placement.gpu_kv_heads
        tokens_fit = not placement.gpu_kv_heads or self.gpu_tokens in (None, placement.gpu_tokens)
        return heads_fit and tokens_fit


FREE_KV = KvBounds()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of every linear and KV shard, in workload order. inserts: of the workload, None is free."""

    linears: tuple[LinearBounds, ...]
    kv: tuple[KvBounds, ...]
    inserts: int | None = None

    def allow(self, linears: Sequence[LinearPlacement], kv: Sequence[KvPlacement]) -> bool:
        """Whether placements in workload order have every width that is fixed."""
        return all(map(LinearBounds.allows, self.linears, linears)) and all(map(KvBounds.allows, self.kv, kv))
