"""Rates as the runtime uses them, with nothing cached and all lanes at once, and the profile that plans are made with.

A whole profile takes more than a minute. What a lent machine of a known kind does with fp32, q8, few threads or small
caches was measured once and is kept in results/gpu/gpu_h100.json; what plans of q4 models depend on is measured again.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .checkpoints import made_checkpoint
from .kernel_parts import device_seconds, tensor_device
from .run import Run

RECORD = Path(__file__).resolve().parents[1] / "results/gpu/gpu_h100.json"
PROFILE_FILE = "profile.json"
# Of the recorded machine, measured after its profile, with more memory than its caches hold.
TRUE_RATES = {"dram": 156e9, "h2d": 50e9, "linear_q4": 130e9}
SWEPT_BYTES = 2 << 30
PIECE_BYTES = 16 << 20
PINNED_BYTES = 1 << 30  # more than a cache holds, so that copies read memory
ROUNDS = 5
INPUTS, FEATURES = 4096, 28_672
ROW_COUNTS = (1, 512, 1024, 2048)


def rates(run: Run) -> dict[str, Any]:
    """DRAM read, CPU linear q4, copies each way, all at once, and the GPU's linear by rows; kept as a profile."""
    from cpu_kernels import CpuKernels
    from hetero_attn.planning.profiles import lane_threads
    from placement.profilers.cpu_linear import linear_call, packed
    from placement.profilers.timing import host_memory, seconds

    if not run.quick:
        made_checkpoint(run.work_dir, "8b")  # nothing else may use the memory meanwhile
    threads = lane_threads()
    with CpuKernels(threads) as ops:
        weight = packed("q4", host_memory((4 << 20) if run.quick else SWEPT_BYTES))
        linear = linear_call(ops, weight, "q4", 1)
        found = {
            "threads": threads,
            "sweep": weight.nbytes / seconds(lambda: ops.sweep(weight), ROUNDS),
            "linear_q4": weight.nbytes / seconds(linear, ROUNDS),
        }
        if not run.has_gpu:
            return {"bytes_per_s": found, "profile": "the catalogue's: no GPU"}
        found |= _bus(run) | _together(run, linear, weight.nbytes)
    run.write("rates alone and together", bytes_per_s=found)
    rows = _gpu_rows(run)
    profile, notes = _profile(run, found, rows)
    (run.out / PROFILE_FILE).write_text(profile.to_json() + "\n")
    return {"bytes_per_s": found, "gpu_rows_ops_per_s": rows, "notes": notes, "profile": profile.to_dict()}


def planning_profile(run: Run) -> Any:
    """The profile to plan with: the one measured in this run, else the recorded machine's at its true rates; None,
    which is the catalogue's, for an emulated GPU."""
    from placement import HardwareProfile

    if not run.has_gpu:
        return None
    if (run.out / PROFILE_FILE).exists():
        return HardwareProfile.from_json((run.out / PROFILE_FILE).read_text())
    return with_rates(recorded_profile(), **TRUE_RATES)


def recorded_profile() -> Any:
    """The profile of the H100 machine that was lent before, its lanes side by side as far as one has been seen to have
    them; as `hetero-attn profile` has it."""
    from placement import HardwareProfile

    results = json.loads(RECORD.read_text())["last_run"]
    profile = HardwareProfile.from_dict(next(result["profile"] for result in results if result["name"] == "profile"))
    seen = HardwareProfile.named("h100-server")
    return replace(
        profile, overlap=seen.overlap, prompt_overlap=seen.prompt_overlap, overlap_source=seen.overlap_source
    )


def with_rates(profile: Any, dram: float, h2d: float, linear_q4: float) -> Any:
    """The profile with other rates of memory, bus and the CPU's q4 linear, bytes a second, few rows included."""
    one_row = linear_q4 / profile.cpu_linear_bytes_per_s.q4 * profile.cpu_rows[0].ops_per_s.q4
    rows = tuple(
        replace(rate, ops_per_s=replace(rate.ops_per_s, q4=min(rate.ops_per_s.q4, rate.rows * one_row)))
        for rate in profile.cpu_rows
    )
    return replace(
        profile, dram_bytes_per_s=dram, h2d_bytes_per_s=h2d, cpu_rows=rows,
        cpu_linear_bytes_per_s=replace(profile.cpu_linear_bytes_per_s, q4=linear_q4),
    )  # fmt: skip


def _profile(run: Run, found: dict[str, float], rows: dict[int, float]) -> tuple[Any, list[str]]:
    """The recorded profile with what was found just now, Python's and the hand-overs' costs too; what could not be."""
    import gpu_kernels
    from hetero_attn.engine.runtime_costs import with_runtime_costs
    from hetero_attn.planning.profiles import host_memory_bytes
    from placement.profilers.gpu import TorchGpu, gpu_attention_rate

    base, notes = recorded_profile(), []
    profile = with_rates(base, max(found["sweep"], found["sum"]), found["h2d"], found["linear_q4"])
    gpu_rows = {rate.rows: rate for rate in profile.gpu_rows}
    for count, ops_per_s in rows.items():
        like = gpu_rows.get(count, profile.gpu_rows[-1])
        gpu_rows[count] = replace(like, rows=count, ops_per_s=replace(like.ops_per_s, q4=ops_per_s))
    profile = replace(
        profile,
        cores=int(found["threads"]),
        dram_bytes=host_memory_bytes(),
        d2h_bytes_per_s=found["d2h"],
        cpu_slowdown_while_copying=min(1.0, found["linear_q4_beside"] / found["linear_q4"]),
        copy_slowdown_while_computing=min(1.0, found["h2d_beside"] / found["h2d"]),
        gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory,
        gpu_rows=tuple(gpu_rows[count] for count in sorted(gpu_rows)),
        gpu_flops=replace(profile.gpu_flops, q4=max(rate.ops_per_s.q4 for rate in gpu_rows.values())),
    )
    try:
        profile = replace(profile, gpu_attention_ops_per_s=gpu_attention_rate(TorchGpu(gpu_kernels)))
        profile = with_runtime_costs(profile, "cuda")
    except Exception as error:  # the recorded costs are better than no plan
        notes.append(f"costs of Python and attention are the recorded ones: {type(error).__name__}: {error}"[:500])
    return profile, notes


def _bus(run: Run) -> dict[str, float]:
    """Bytes a second each way, in pieces as weights pass."""
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1).view(-1, PIECE_BYTES)
    device = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=run.device)
    found = {}
    for name in ("h2d", "d2h"):
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for piece in host:
                target, source = (device, piece) if name == "h2d" else (piece, device)
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[name] = host.nbytes / statistics.median(times)
    return found


def _together(run: Run, linear: Any, weight_bytes: int) -> dict[str, float]:
    """Bytes a second of the CPU's linear and of copies to the GPU while both run, and their sum: what memory gives."""
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1).view(-1, PIECE_BYTES)
    device = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=run.device)
    copies, pairs = torch.cuda.Stream(), []
    for _ in range(ROUNDS):
        events = []
        with torch.cuda.stream(copies):
            for _ in range(3):  # far longer than the linear takes
                for piece in host:
                    device.copy_(piece, non_blocking=True)
                    events.append(torch.cuda.Event())
                    events[-1].record(copies)
        before = sum(event.query() for event in events)
        started = time.perf_counter()
        linear()
        taken, after = (time.perf_counter() - started, sum(event.query() for event in events))
        torch.cuda.synchronize()
        if after < len(events):  # else the copies ended first
            pairs.append((weight_bytes / taken, (after - before) * PIECE_BYTES / taken))
    if not pairs:
        raise RuntimeError("the copies ended before the CPU's linear did; queue more of them")
    cpu, bus = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return {"linear_q4_beside": cpu, "h2d_beside": bus, "sum": cpu + bus}


def _gpu_rows(run: Run) -> dict[int, float]:
    """Operations a second of the GPU's q4 linear by rows."""
    from cpu_kernels.formats.weights import BLOCK_FEATURES, block_bytes

    device, ops = tensor_device(run)
    shape = (FEATURES // BLOCK_FEATURES, block_bytes("q4", INPUTS))
    weights, found = ([torch.full(shape, 60, dtype=torch.uint8, device=device) for _ in range(3)], {})
    for rows in ROW_COUNTS:
        x, out = (torch.randn(rows, INPUTS, device=device), torch.empty(rows, FEATURES, device=device))

        def all_weights(x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            for weight in weights:
                ops.linear(x, weight, "q4", None, out)

        found[rows] = len(weights) * 2 * rows * INPUTS * FEATURES / device_seconds(run, all_weights, 4)
    return found
