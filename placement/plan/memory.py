"""How many bytes each placement takes, by place and kind. The runtime allocates by calling the same functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from placement.plan.shards import KvShard, LinearShard
from placement.plan.workload import NUM_ROW_TIERS, Workload, round_up

PLACES = ("gpu", "pinned", "host")
OF_OTHERS = ("context", "drafter")  # kinds that others than the model allocate
KINDS = ("weights", "expert_slots", "kv", "staging", "activations", "embed", "resident", "prefixes", *OF_OTHERS)
KV_STAGING_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class LinearPlacement:
    """The cut of one linear: the first `gpu_units` live in GPU memory, the rest in DRAM (one copy).

    stream_units: per row tier, how many dram-home units, counted from the home boundary, are copied to the GPU for the
    call; the CPU computes the remaining ones in place. expert_slots: of experts, how many of those in DRAM have a copy
    in GPU memory, which ones a step finds in a table; it computes those picks there, whatever the tier.
    """

    name: str
    gpu_units: int
    stream_units: tuple[int, ...]
    units: int
    expert_slots: int = 0

    def __post_init__(self) -> None:
        if len(self.stream_units) != NUM_ROW_TIERS:
            raise ValueError(f"{self.name}: stream_units needs {NUM_ROW_TIERS} entries, got {len(self.stream_units)}")
        if not 0 <= self.gpu_units <= self.units:
            raise ValueError(f"{self.name}: gpu_units must be in 0..{self.units}, got {self.gpu_units}")
        in_dram = self.units - self.gpu_units
        if min(self.stream_units) < 0 or max(self.stream_units) > in_dram:
            tier, stream = next((tier, n) for tier, n in enumerate(self.stream_units) if not 0 <= n <= in_dram)
            raise ValueError(f"{self.name}: stream_units[{tier}] must be in 0..{in_dram}, got {stream}")
        if not 0 <= self.expert_slots <= in_dram:
            raise ValueError(f"{self.name}: expert_slots must be in 0..{in_dram}, got {self.expert_slots}")

    @property
    def dram_units(self) -> int:
        """Units whose home is DRAM."""
        return self.units - self.gpu_units

    @property
    def streams(self) -> bool:
        """Whether any row tier copies units of this linear to the GPU."""
        return max(self.stream_units) > 0

    @property
    def is_copied(self) -> bool:
        """Whether anything of it is copied to the GPU after loading, and so must be page-locked."""
        return self.streams or self.expert_slots > 0

    def cut(self, tier: int) -> tuple[int, int, int]:
        """Contiguous widths (gpu, stream, cpu) in units for a row tier; they sum to `units`."""
        stream = self.stream_units[tier]
        return self.gpu_units, stream, self.units - self.gpu_units - stream


@dataclass(frozen=True, slots=True)
class KvPlacement:
    """Who owns the KV heads of one layer.

    Heads [0, gpu_kv_heads) belong to the GPU: their newest `gpu_tokens` tokens, counted over all sequences, stay in GPU
    memory and older ones go to DRAM. The other KV heads keep K and V in DRAM and attend on the CPU.
    """

    name: str
    gpu_kv_heads: int
    gpu_tokens: int
    kv_heads: int

    def __post_init__(self) -> None:
        if not 0 <= self.gpu_kv_heads <= self.kv_heads:
            raise ValueError(f"{self.name}: gpu_kv_heads must be in 0..{self.kv_heads}, got {self.gpu_kv_heads}")
        if (self.gpu_kv_heads == 0) != (self.gpu_tokens == 0):
            raise ValueError(
                f"{self.name}: gpu_kv_heads and gpu_tokens must be zero together, got {self.gpu_kv_heads} and "
                f"{self.gpu_tokens}"
            )

    @property
    def groups(self) -> int:
        """`kv_heads`, by the name that plans print."""
        return self.kv_heads

    @property
    def gpu_groups(self) -> int:
        """`gpu_kv_heads`, by the name that plans print."""
        return self.gpu_kv_heads


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of a plan by place (one of PLACES) and kind (some of KINDS)."""

    gpu: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        """All bytes in GPU memory."""
        return sum(self.gpu.values())

    @property
    def pinned_bytes(self) -> int:
        """All bytes of page-locked host memory."""
        return sum(self.pinned.values())

    @property
    def others_gpu_bytes(self) -> int:
        """GPU memory of the budget that is not the model's own: what CUDA and what a drafter takes."""
        return sum(self.gpu.get(kind, 0) for kind in OF_OTHERS)

    @property
    def host_bytes(self) -> int:
        """All bytes of ordinary host memory."""
        return sum(self.host.values())

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain nested mapping place -> kind -> bytes."""
        return {place: dict(getattr(self, place)) for place in PLACES}


def kv_recent_tokens(workload: Workload, shard: KvShard, gpu_tokens: int) -> int:
    """KV slots in GPU memory for a GPU-owned KV head, in whole pages: `gpu_tokens`, or all that the layer ever
    takes."""
    return min(round_up(gpu_tokens, workload.page_size), workload.layer_tokens(shard))


def kv_spilled_tokens(workload: Workload, shard: KvShard, gpu_tokens: int) -> int:
    """KV slots in DRAM for the older tokens of a GPU-owned KV head: every token may be there once some have to be."""
    all_tokens = workload.layer_tokens(shard)
    may_spill = workload.elastic or kv_recent_tokens(workload, shard, gpu_tokens) < all_tokens
    return all_tokens if may_spill else 0


def kv_gpu_bytes(workload: Workload, shard: KvShard, placement: KvPlacement) -> int:
    """GPU memory of one layer's KV cache."""
    tokens = kv_recent_tokens(workload, shard, placement.gpu_tokens)
    return placement.gpu_kv_heads * tokens * shard.bytes_per_token


def kv_pinned_bytes(workload: Workload, shard: KvShard, placement: KvPlacement) -> int:
    """Page-locked DRAM of one layer's KV cache: older tokens of the GPU's KV heads, whose pages are copied both
    ways."""
    return placement.gpu_kv_heads * kv_spilled_tokens(workload, shard, placement.gpu_tokens) * shard.bytes_per_token


def kv_host_bytes(workload: Workload, shard: KvShard, placement: KvPlacement) -> int:
    """Ordinary DRAM of one layer's KV cache: all tokens of the CPU's kv_heads, which never leave it."""
    return (placement.kv_heads - placement.gpu_kv_heads) * workload.layer_tokens(shard) * shard.bytes_per_token


def kv_dram_bytes(workload: Workload, shard: KvShard, placement: KvPlacement) -> int:
    """DRAM of one layer's KV cache: older tokens of the GPU's KV heads and all tokens of the CPU's."""
    return kv_pinned_bytes(workload, shard, placement) + kv_host_bytes(workload, shard, placement)


def kv_staging_pages(workload: Workload) -> int:
    """Pages of older tokens that are copied to the GPU at a time, for a prompt's chunk to attend: as many as it has."""
    return max(1, workload.prefill_chunk // workload.page_size)


def kv_staging_bytes(workload: Workload) -> int:
    """GPU memory of the buffers for them, and of the table that says where a buffer has which page."""
    widest, pages = max((shard.kv_heads for shard in workload.kv), default=0), kv_staging_pages(workload)
    token = widest * max((shard.bytes_per_token for shard in workload.kv), default=0)
    return KV_STAGING_BUFFERS * pages * workload.page_size * token + 4 * widest * pages


def gpu_resident_bytes(workload: Workload) -> int:
    """GPU memory that no placement changes: norms, biases, tables, states, and the buffers of the older cache."""
    return workload.resident_bytes + workload.state_bytes + kv_staging_bytes(workload)


def staging_piece_units(shard: LinearShard, workload: Workload) -> int:
    """Units of a linear in one piece, of which it streams as many as it needs: whole units of at most
    `workload.staging_piece_bytes`, at least one."""
    return min(shard.units, max(1, workload.staging_piece_bytes // shard.unit_bytes))


def staging_piece_bytes(shard: LinearShard, workload: Workload) -> int:
    """What a staging slot holds of a linear that streams."""
    return staging_piece_units(shard, workload) * shard.unit_bytes


def staging_slot_bytes(workload: Workload, placements: Sequence[LinearPlacement]) -> int:
    """Size of a staging slot: the largest piece of any linear that streams in some tier; 0 when nothing streams."""
    return max(
        (
            staging_piece_bytes(shard, workload)
            for shard, placement in zip(workload.linears, placements, strict=True)
            if placement.streams
        ),
        default=0,
    )


def is_all_on_gpu(workload: Workload, linears: Sequence[LinearPlacement], kv: Sequence[KvPlacement]) -> bool:
    """Whether all weights and the whole cache are in GPU memory, so that no other lane has anything to do."""
    return all(placement.gpu_units == placement.units for placement in linears) and all(
        placement.gpu_kv_heads == placement.kv_heads and placement.gpu_tokens >= workload.layer_tokens(shard)
        for shard, placement in zip(workload.kv, kv, strict=True)
    )


def activation_bytes(workload: Workload) -> int:
    """Activations of the largest call in GPU memory, allocated once."""
    return workload.activation_bytes_per_row * workload.activation_rows


def host_activation_bytes(workload: Workload) -> int:
    """Activations of the largest call in host memory, likewise."""
    return (workload.host_activation_bytes_per_row or workload.activation_bytes_per_row) * workload.activation_rows


def rounded_input_bytes(workload: Workload) -> int:
    """Most bytes of the rounded copy that a GPU kernel makes of a linear's input, beside what a plan allocates."""
    return workload.activation_rows * max(_rounded_bytes_of_a_row(shard) for shard in workload.linears)


def _rounded_bytes_of_a_row(shard: LinearShard) -> int:
    """Its inputs; or what its experts multiply last, the neurons of each in bf16, padded to 64."""
    neurons = shard.flops_per_row_per_unit // (6 * shard.in_features)  # gate, up and down, two operations a weight
    return max(4 * shard.in_features, 2 * shard.picks * (neurons + 64))


def weights_bytes(workload: Workload, placements: Sequence[LinearPlacement], place: str) -> int:
    """Weight bytes at a place."""
    pairs = zip(workload.linears, placements, strict=True)
    return sum(linear_bytes(workload, shard, placement, place) for shard, placement in pairs)


def linear_bytes(workload: Workload, shard: LinearShard, placement: LinearPlacement, place: str) -> int:
    """Bytes of a linear at a place, expert slots apart. Units in DRAM are pinned if they are or may be copied later."""
    if place == "gpu":
        return placement.gpu_units * shard.unit_bytes
    if (placement.is_copied or workload.elastic) == (place == "pinned"):
        return (placement.units - first_dram_unit(workload, placement)) * shard.unit_bytes
    return 0


def expert_slot_bytes(shard: LinearShard, placement: LinearPlacement) -> int:
    """GPU memory of a layer's expert slots: their experts, and a table from experts to slots and back, int32."""
    count = placement.expert_slots
    return count * shard.unit_bytes + 4 * (placement.units + count) if count else 0


def first_dram_unit(workload: Workload, placement: LinearPlacement) -> int:
    """The unit from which on a linear is in DRAM: its home boundary, or 0 when GPU units have a copy there too."""
    return 0 if workload.elastic else placement.gpu_units


def memory_report(
    workload: Workload,
    linears: Sequence[LinearPlacement],
    kv: Sequence[KvPlacement],
    *,
    device: str,
    staging_slots: int,
    context_bytes: int = 0,
) -> MemoryReport:
    """Count every byte that a run with these placements allocates, and what drafts for the model beside it.

    linears, kv: in workload order. device: cpu | cuda | emulated. context_bytes: the driver's own share of GPU memory.
    """

    def kv_bytes(of_layer: Callable[[Workload, KvShard, KvPlacement], int]) -> int:
        return sum(of_layer(workload, shard, placement) for shard, placement in zip(workload.kv, kv, strict=True))

    host = {
        "weights": weights_bytes(workload, linears, "host"),
        "kv": kv_bytes(kv_host_bytes),
        "activations": host_activation_bytes(workload),
        "embed": workload.embed_bytes,
    }
    if workload.states:
        host["prefixes"] = workload.prefix_state_bytes
    drafter = workload.drafter_bytes
    host |= drafter["host"]
    if device == "cpu":
        return MemoryReport(host=host | {"resident": workload.resident_bytes + workload.state_bytes})
    gpu = {
        "weights": weights_bytes(workload, linears, "gpu"),
        "kv": kv_bytes(kv_gpu_bytes),
        "staging": staging_slots * staging_slot_bytes(workload, linears),
        "activations": activation_bytes(workload),
        "resident": gpu_resident_bytes(workload),
        "context": context_bytes,
    }
    if in_expert_slots := sum(map(expert_slot_bytes, workload.linears, linears)):
        gpu["expert_slots"] = in_expert_slots
    pinned = {"weights": weights_bytes(workload, linears, "pinned"), "kv": kv_bytes(kv_pinned_bytes)}
    return MemoryReport(gpu=gpu | drafter["gpu"], pinned=pinned | drafter["pinned"], host=host)
