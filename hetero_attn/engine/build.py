"""Put a planned model together: device, lanes, weights, cache, engine. A failure leaves nothing behind."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cpu_kernels import CpuKernels
from hetero_attn.cache.cache import KVCache
from hetero_attn.cache.stream import PageStream
from hetero_attn.checkpoints.loading.load import Loader
from hetero_attn.checkpoints.sources import open_source
from hetero_attn.devices import CudaDriver, Device, EmulatedDriver
from hetero_attn.devices.machine import (
    SLACK_BYTES,
    arena_bytes,
    device_index,
    temporary_bytes,
)
from hetero_attn.devices.readiness import check_ready
from hetero_attn.engine.ahead.compile_ahead import compiling_beside, kernel_calls
from hetero_attn.engine.ahead.warm_up import make_first_steps, warm_up, warm_up_copies
from hetero_attn.engine.engine import Engine
from hetero_attn.engine.forked import torch_without_lost_threads
from hetero_attn.engine.host_memory import expect_room, memory_named
from hetero_attn.engine.passes.buffers import make_buffers
from hetero_attn.lanes.handover_choice import choose_handover
from hetero_attn.lanes.host_worker import HostWorker
from hetero_attn.lanes.lanes import Lanes
from hetero_attn.lanes.staging import make_ring
from hetero_attn.lanes.tables import StepTables
from hetero_attn.models.decoder import ModelWeights
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.workload import step_table_bytes
from placement.plan.plan import Plan

Progress = Callable[[int], None]


def build_engine(
    planned: PlannedModel,
    overlap: bool = True,
    progress: Progress = lambda count: None,
    on_compile: Callable[[str], None] | None = None,
    prefix_cache: bool = True,
    handover: str = "auto",
    on_prepare: Callable[[str], None] = lambda name: None,
) -> Engine:
    """Load a planned model.

    progress(count) is called with the bytes of weights just placed, on_compile(name) before a CPU kernel is compiled,
    on_prepare(name), perhaps in another thread, before GPU kernels are compiled beside the weights, and before each of
    the first steps on a GPU.

    Raises CheckpointError for weights that do not fit the config, MemoryBudgetError when memory runs out.
    """
    with loading(planned.plan):
        lanes = make_lanes(planned, overlap, on_compile, handover)
        return _build_on(lanes, planned, overlap, progress, prefix_cache, on_prepare)


def build_beside(planned: PlannedModel, engine: Engine, on_prepare: Callable[[str], None]) -> Engine:
    """Load another model on the threads of an engine that never computes at the same time: two teams would take the
    cores from each other. Closing either engine ends them. A head without a token embedding has that engine's. Raises
    as `build_engine`."""
    with loading(planned.plan):
        lanes = make_lanes(planned, True, host_ops=engine.lanes.host_ops)
        return _build_on(lanes, planned, True, lambda count: None, True, on_prepare, engine.weights)


@contextmanager
def loading(plan: Plan) -> Iterator[None]:
    """Around the loading of a plan: what does not fit is refused before, what runs out is named."""
    expect_room(plan)
    with memory_named(f"loading {plan.model}"), torch_without_lost_threads():
        yield


def _build_on(
    lanes: Lanes,
    planned: PlannedModel,
    overlap: bool,
    progress: Progress,
    prefix_cache: bool,
    on_prepare: Callable[[str], None],
    lender: ModelWeights | None = None,
) -> Engine:
    """`build_engine` on lanes that are there, with a GPU's kernels compiled beside the weights. lender: as in
    `assemble`."""
    if lanes.device is None or lanes.device.kind != "cuda":
        return assemble(planned, lanes, overlap, progress, prefix_cache, lender)
    with compiling_beside(kernel_calls(planned), device_index(planned.device), on_prepare):
        engine = assemble(planned, lanes, overlap, progress, prefix_cache, lender)
    try:
        make_first_steps(engine, on_prepare, planned.hardware.int8_rows.values())
    except BaseException:
        engine.close()
        raise
    return engine


def assemble(
    planned: PlannedModel,
    lanes: Lanes,
    overlap: bool = True,
    progress: Progress = lambda count: None,
    prefix_cache: bool = True,
    lender: ModelWeights | None = None,
) -> Engine:
    """Load a planned model onto lanes that are there; closes them if anything fails. lender: whose token embedding
    serves where the files have none."""
    try:
        with open_source(planned.path, planned.headers) as checkpoint:
            for warning in checkpoint.check(planned.model):
                warnings.warn(f"{planned.path}: {warning}", stacklevel=3)
            formats = planned.weight_formats
            warm_up(lanes.host_ops, planned.config, formats, planned.plan.workload.kv_dtype)
            buffers = make_buffers(planned.model, planned.plan, lanes)
            model = planned.model
            if model.taps:
                warm_up_copies(lanes.host_ops)
            weights = Loader(checkpoint, planned.config, model, planned.plan, formats, lanes, progress).load()
            if not model.owns_embedding:
                weights = replace(weights, embed=lender.embed, embed_format=lender.embed_format)
            cache = KVCache(planned.plan, lanes.device, prefix_cache)
            return Engine(planned.config, planned.plan, weights, lanes, cache, buffers, overlap)
    except BaseException:
        lanes.close()
        raise


def make_lanes(
    planned: PlannedModel,
    overlap: bool,
    on_compile: Callable[[str], None] | None = None,
    handover: str = "auto",
    host_ops: CpuKernels | None = None,
) -> Lanes:
    """Start the lanes of a plan, over threads that are there or new ones."""
    plan = planned.plan
    with ExitStack() as undo:
        gpu = make_device(planned)
        if gpu is not None:
            undo.callback(gpu.close)
        host_ops = host_ops or undo.enter_context(CpuKernels(plan.num_threads, on_compile=on_compile))
        # The worker's thread starts with its first job, so a failure here leaves none.
        worker = HostWorker() if overlap else None
        lanes = Lanes(host_ops) if gpu is None else connect(plan, host_ops, gpu, worker, handover)
        undo.pop_all()
    return lanes


def connect(plan: Plan, host_ops: CpuKernels, gpu: Device, worker: Executor | None, handover: str = "auto") -> Lanes:
    """The lanes of a plan over a device; `worker` is the one thread of host jobs, None runs them on the caller's."""
    tables = StepTables(gpu, step_table_bytes_of(plan))
    chosen = None if worker is None else choose_handover(handover, gpu, worker, host_ops, tables)
    return Lanes(host_ops, gpu, make_ring(plan, gpu), tables, chosen, PageStream(gpu, plan.workload))


def step_table_bytes_of(plan: Plan) -> int:
    """What the largest tables of a step take."""
    workload, pages = plan.workload, -(-plan.max_context // plan.page_size)
    kv_heads = max((shard.kv_heads for shard in workload.kv), default=0)
    return step_table_bytes(
        len(workload.kv), kv_heads, workload.activation_rows, workload.max_batch, pages, bool(workload.states)
    )


def make_device(planned: PlannedModel) -> Device | None:
    """The device of a plan, which computes as its hardware does best; None for the CPU alone."""
    plan, device = planned.plan, planned.device
    if device == "cpu":
        return None
    if device == "emulated":
        return Device(EmulatedDriver(), plan.own_gpu_bytes)
    index = device_index(device)
    check_ready(index)
    arena = arena_bytes(plan, index)
    driver = CudaDriver(
        index, arena + SLACK_BYTES, temporary_bytes(plan.workload), int8_rows=planned.hardware.int8_rows
    )
    return Device(driver, arena)
