"""How long one recorded operation takes on a machine, by its bytes and operations and the rates of a profile."""

from typing import Any

import torch

from cpu_kernels.formats import BLOCK_FEATURES, Segment, segments, unit_blocks
from gpu_kernels.forms.as_they_lie import is_read_as_it_lies
from hetero_attn.devices.cuda import KERNEL_COPY_BYTES
from hetero_attn.tools.timeline.recording import COPIES, CPU, GPU, MAIN, Entry
from placement.cost.terms import GPU_PRODUCT_BYTES, LINEARS_PER_LAYER
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import KV_BITS, nearest_attention, seconds_per_operation_of_a_row

# What a kernel of next to no work takes within a captured step, and what the copy engine needs to start: an H100 moved
# 16 KiB both ways in 3.6 us by two kernels and in 13.1 us by two copies.
KERNEL_S, ENGINE_COPY_S = 1.8e-6, 6e-6
# What a linear of the CPU lane takes within a step beyond its bytes at the rate of large ones: threads that start and
# end apart. 33 to 97 linears a step took 5 to 14 us more each on 15 threads beside that H100.
CPU_LINEAR_S = 8e-6
# Of a layer of a prompt with one product a linear: a rounding and two launches each, and five small kernels.
LAUNCHES_OF_A_LAYER = 3 * LINEARS_PER_LAYER + 5
KV_BITS_OF = {torch.float32: 32.0, torch.bfloat16: 16.0, torch.int8: KV_BITS["q8"], torch.uint8: KV_BITS["q4"]}


class Durations:
    """Seconds of recorded entries on a machine. queries_per_kv, head_dim: of the model's attention."""

    def __init__(self, hardware: HardwareProfile, queries_per_kv: int, head_dim: int) -> None:
        self.hardware = hardware
        self._heads, self._head_dim = queries_per_kv, head_dim
        self._launch_s = hardware.gpu_layer_overhead_s / LAUNCHES_OF_A_LAYER
        # A product more is two launches and a turn of the ring: a copy, two waits and two events.
        self._turn_s = max(0.0, hardware.gpu_product_overhead_s - 2 * self._launch_s) / 5
        # A hand-over as it was measured has a copy each way and an addition, which are entries of their own.
        self.flag_s = max(0.0, hardware.handover_s - 3 * KERNEL_S) / 2

    def seconds(self, entry: Entry) -> float:
        """Of work by itself, with nothing beside it."""
        if entry.lane == MAIN:
            return self._main(entry)
        arguments = entry.arguments
        if entry.lane == CPU:
            call_s = self.hardware.cpu_recorded_call_s if entry.replayed else self.hardware.cpu_call_s
            return call_s + getattr(self, f"_cpu_{entry.operation}", self._cpu_small)(arguments, entry)
        start = 0.0 if entry.operation == "copy" else KERNEL_S
        return start + getattr(self, f"_{entry.operation}", self._small)(arguments, entry)

    def reads_dram(self, entry: Entry) -> bool:
        """Whether work of the CPU lane waits for memory, so that copies and it slow each other."""
        if entry.operation == "linear":
            read_s = entry.arguments["weight"].nbytes / self._linear_rate(entry.arguments)
            return read_s > self.seconds(entry) / 2
        return entry.operation == "decode_attention"

    def _main(self, entry: Entry) -> float:
        """Of the calling thread: launching, and queueing what is not captured."""
        queued = entry.arguments.get("of")
        if queued is None:
            return 0.0
        if queued.kind != "work" or queued.lane == COPIES:
            return self._turn_s
        count = 2 * products(queued.arguments, self.hardware) if queued.operation == "linear" else 1
        return self._launch_s * count

    def _copy(self, arguments: dict[str, Any], entry: Entry) -> float:
        hardware, nbytes = self.hardware, arguments["nbytes"]
        rate = hardware.h2d_bytes_per_s if arguments["to_gpu"] else hardware.d2h_bytes_per_s
        by_kernel = entry.lane == GPU and nbytes <= KERNEL_COPY_BYTES
        return (KERNEL_S if by_kernel else ENGINE_COPY_S if entry.lane == GPU else 0.0) + nbytes / rate

    def _linear(self, arguments: dict[str, Any], entry: Entry) -> float:
        hardware, rows, fmt = self.hardware, arguments["out"].shape[0], arguments["weight_dtype"]
        operations = _operations_of_a_row(arguments)
        if hardware.gpu_rows:
            return operations * seconds_per_operation_of_a_row(hardware.gpu_rows, rows, fmt)
        read_s = arguments["weight"].nbytes / hardware.gpu_bytes_per_s
        return max(read_s, rows * operations / hardware.gpu_ops_per_s(fmt, rows))

    def _decode_attention(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _decode_bytes(arguments) / self.hardware.gpu_bytes_per_s + 4 * KERNEL_S  # 10 us for 1k tokens

    def _prefill_attention(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _prefill_operations(arguments) / self.hardware.gpu_attention_ops_per_s

    def _add_rows(self, arguments: dict[str, Any], entry: Entry) -> float:
        return arguments["source"].nbytes / self.hardware.h2d_bytes_per_s  # which the kernel reads in host memory

    def _small(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _moved_bytes(entry) / self.hardware.gpu_bytes_per_s

    def _rounded(self, arguments: dict[str, Any], entry: Entry) -> float:
        return 0.0  # the linear's rate was measured with it

    def _linear_rate(self, arguments: dict[str, Any]) -> float:
        return self.hardware.cpu_linear_bytes_per_s.of(arguments["weight_dtype"])

    def _cpu_linear(self, arguments: dict[str, Any], entry: Entry) -> float:
        hardware, (rows, features), fmt = self.hardware, arguments["out"].shape, arguments["weight_dtype"]
        activations_s = rows * (features + arguments["x"].shape[1]) * hardware.cpu_activation_s.of(fmt)
        operations = _operations_of_a_row(arguments)
        fixed_s = CPU_LINEAR_S + activations_s
        if hardware.cpu_rows:
            return fixed_s + operations * seconds_per_operation_of_a_row(hardware.cpu_rows, rows, fmt)
        read_s = arguments["weight"].nbytes / self._linear_rate(arguments)
        return fixed_s + max(read_s, rows * operations / hardware.cpu_ops_per_s.of(fmt))

    def _expert_linear(self, arguments: dict[str, Any], entry: Entry) -> float:
        share, rows = _expert_share(arguments)
        return share * self._linear(_as_linear(arguments, rows), entry)

    def _cpu_expert_linear(self, arguments: dict[str, Any], entry: Entry) -> float:
        share, rows = _expert_share(arguments)
        return share * self._cpu_linear(_as_linear(arguments, rows), entry)

    def _cpu_decode_attention(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _decode_bytes(arguments) / self._attention_rates(arguments)[0]

    def _cpu_prefill_attention(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _prefill_operations(arguments) / self._attention_rates(arguments)[1]

    def _cpu_small(self, arguments: dict[str, Any], entry: Entry) -> float:
        return _moved_bytes(entry) / (self.hardware.cpu_small_bytes_per_s or self.hardware.dram_bytes_per_s)

    def _attention_rates(self, arguments: dict[str, Any]) -> tuple[float, float]:
        hardware = self.hardware
        if not hardware.cpu_attention:
            return hardware.cpu_attention_bytes_per_s, hardware.cpu_attention_ops_per_s
        bits = KV_BITS_OF[arguments["pages"].k.dtype]
        rate = nearest_attention(hardware.cpu_attention, bits, self._heads, self._head_dim)
        return rate.bytes_per_s, rate.ops_per_s


def products(arguments: dict[str, Any], hardware: HardwareProfile) -> int:
    """In how many products a GPU computes a linear: one for each format of a mix, more where a weight is too large to
    become dense at once."""
    (units, _), (rows, inputs) = arguments["weight"].shape, arguments["x"].shape
    parts = segments(arguments["weight_dtype"], inputs)
    return sum(_products_of_part(part, units, (rows, inputs), hardware) for part in parts)


def _products_of_part(part: Segment, units: int, shape: tuple[int, int], hardware: HardwareProfile) -> int:
    (rows, inputs), name = shape, part.format.name
    is_dense = name in ("fp32", "bf16")
    if is_dense or rows <= hardware.int8_rows.get(name, 0) or is_read_as_it_lies(rows, name, inputs):
        return 1
    dense_bytes = 2 * units * part.blocks * BLOCK_FEATURES * inputs
    return max(1, -(-dense_bytes // GPU_PRODUCT_BYTES))


def _operations_of_a_row(arguments: dict[str, Any]) -> int:
    weight, in_features = arguments["weight"], arguments["x"].shape[1]
    return 2 * weight.shape[0] * BLOCK_FEATURES * unit_blocks(arguments["weight_dtype"]) * in_features


def _expert_share(arguments: dict[str, Any]) -> tuple[float, int]:
    """The expected share of a call's experts that have a pick, and how many picks such a one has, at least one."""
    picks, all_experts = arguments["out"].shape[0], arguments["picks"].starts.shape[0] - 1
    share = 1 - (1 - 1 / all_experts) ** picks
    return share, max(1, round(picks / (all_experts * share)))


def _as_linear(arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    """All experts of a call as one linear of so many rows."""
    weight, x, out = arguments["weight"], arguments["x"], arguments["out"]
    shape = (rows, weight.shape[0] * out.shape[1])
    return {
        "x": x[:1].expand(rows, -1),
        "weight": weight.flatten(0, 1),
        "weight_dtype": arguments["weight_dtype"],
        "out": torch.empty(shape, dtype=torch.float32, device="meta"),
    }


def _decode_bytes(arguments: dict[str, Any]) -> int:
    keys, cached = arguments["keys"], arguments["pages"].k
    tokens = int((keys.stop - keys.start).sum())
    return 2 * tokens * keys.table.shape[1] * cached.shape[2] * cached.itemsize


def _prefill_operations(arguments: dict[str, Any]) -> float:
    """Of the keys that each row sees: those in the range, before it and in its window."""
    (rows, heads, head_dim), keys = arguments["q"].shape, arguments["keys"]
    middle = keys.q_start + (rows + 1) / 2
    seen = max(0.0, min(keys.stop, middle) - keys.start)
    return 4 * head_dim * heads * rows * min(seen, keys.window or seen)


def _moved_bytes(entry: Entry) -> int:
    regions = (*entry.reads, *entry.writes)
    return sum(region.width * region.rows for region in regions if region.rows * region.width < GPU_PRODUCT_BYTES * 16)
