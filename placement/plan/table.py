"""The plan as plain text: placements by lane, bytes by place and kind, predicted speed."""

import io
from collections import Counter
from typing import Protocol

from rich.console import Console
from rich.table import Table

from placement.plan.memory import (
    KINDS,
    PLACES,
    KvPlacement,
    LinearPlacement,
    MemoryReport,
    expert_slot_bytes,
    first_dram_unit,
    kv_dram_bytes,
    kv_gpu_bytes,
)
from placement.plan.phase import RESOURCE_WORDS, Prediction
from placement.plan.rows import SOME, PlanRow, plan_rows, shown_rows
from placement.plan.units import digits, format_bytes
from placement.plan.warm import expert_slots_line, streamed_experts_line
from placement.plan.words import cpu_threads, wrapped
from placement.plan.workload import NUM_ROW_TIERS, Workload

COLUMNS = ("shard", "count", "units", "GPU home", "decode g/s/c", "prefill g/s/c", "GPU bytes", "DRAM bytes")
# In a narrow terminal: without what the cut and the label tell, so that no number is ever cut.
FORMAT_COLUMN = "weights"  # only where linears differ in it
NARROW_COLUMNS = {0: "shard", 3: "home", 4: "decode", 5: "prefill", 6: "GPU", 7: "DRAM"}
MOST_COLUMNS = 1000
EXPERT_SLOTS_LEGEND = ", and expert slots, whose picks the gpu lane computes"
LEGEND = "g/s/c: units computed on the gpu, stream and cpu lane in one step; home: units in GPU memory"
SOME_LEGEND, COUNTED = f"a{SOME}b: some of these layers", ", as many as count says"
PHASE_INDENT = 12
PLACE_WORDS = {"gpu": "GPU memory", "pinned": "pinned DRAM", "host": "host DRAM"}


class ShownPlan(Protocol):
    """What of a plan is shown: `placement.plan.plan.Plan` is one."""

    workload: Workload
    device: str
    gpu_memory_bytes: int | None
    linears: tuple[LinearPlacement, ...]
    kv: tuple[KvPlacement, ...]
    num_threads: int
    memory: MemoryReport
    predicted: Prediction | None

    @property
    def model(self) -> str:
        """Name of the planned model."""

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence."""

    @property
    def max_batch(self) -> int:
        """Sequences decoded together."""

    def kv_by_context(self) -> list[tuple[int, int, int]]:
        """Bytes that one sequence takes of the cache, in GPU memory and in DRAM, by context."""


def plan_table(plan: ShownPlan, width: int) -> str:
    """Render a plan as text of at most `width` columns, without colour codes."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, emoji=False)

    def say(line: str) -> None:
        console.print(wrapped(line, width), highlight=False, soft_wrap=True)

    budget = f", GPU memory budget {format_bytes(plan.gpu_memory_bytes)}" if plan.gpu_memory_bytes is not None else ""
    say(
        f"{plan.model} on {plan.device}{budget}, context {plan.max_context}, batch {plan.max_batch}, "
        f"{plan.workload.weight_dtype} weights, {plan.workload.kv_dtype} KV, " + cpu_threads(plan.num_threads)
    )
    is_wide = _is_wide(plan, width)
    console.print(_placements(plan, is_wide))
    if plan.device != "cpu":
        legend = LEGEND if is_wide else LEGEND.replace("g/s/c", "decode, prefill (gpu/stream/cpu)")
        say(legend + EXPERT_SLOTS_LEGEND * any(placement.expert_slots for placement in plan.linears))
    if any(SOME in row.label for row in _linear_rows(plan) + _kv_rows(plan)):
        has_counts = is_wide or plan.device == "cpu"
        say(f"{SOME_LEGEND}{COUNTED if has_counts else ''}; --yaml names them")
    if plan.workload.is_mixed and not is_wide:
        say(f"weights: {_formats(plan)}")
    console.print(_memory(plan, is_wide))
    batch_steps = 1 if plan.predicted is None else plan.predicted.decode.batch_steps
    of_experts = (
        experts_line(plan.workload),
        expert_slots_line(plan.workload, plan.linears, batch_steps),
        streamed_experts_line(plan.workload, plan.linears),
    )
    for line in filter(None, of_experts):
        say(line)
    say(kv_line(plan))
    if plan.predicted is not None:
        for line in prediction_lines(plan.predicted, width):
            say(line)
    return console.file.getvalue()


def opening_lines(plan: ShownPlan, fits: bool = True, dram_bytes: int = 0) -> list[str]:
    """The four things that a newcomer wants: does it fit, how fast, what is where, what would change it.

    dram_bytes: that the machine has, 0 where that is not known.
    """
    memory, on_gpu = plan.memory, plan.device != "cpu"
    lines = _memory_lines(plan, fits, dram_bytes)
    if plan.predicted is not None:
        decode, prefill = plan.predicted.decode, plan.predicted.prefill
        lines.append(
            f"speed: about {_rounded(decode.tokens_per_s)} tokens/s, "
            f"prompts {_rounded(prefill.tokens_per_s)} tokens/s, predicted"
        )
    by_place = memory.to_dict()

    def at(kind: str) -> str:
        dram = format_bytes(sum(by_place[place].get(kind, 0) for place in ("pinned", "host")))
        return f"{format_bytes(by_place['gpu'].get(kind, 0))} + {dram}" if on_gpu else dram

    places = "GPU + DRAM" if on_gpu else "DRAM"
    whose = "of the model, " if plan.workload.drafter_host_bytes else ""
    copies_bytes = memory.gpu.get("expert_slots", 0)
    copies = f"expert slots {format_bytes(copies_bytes)}; " if copies_bytes else ""
    lines.append(f"where: {whose}weights {at('weights')}; {copies}cache {at('kv')} ({places})")
    ways = "--gpu-memory, " if on_gpu else ""
    lines.append(f"to change it: {ways}--context, --batch, --dtype, --kv-dtype")
    return lines


def _memory_lines(plan: ShownPlan, fits: bool, dram_bytes: int) -> list[str]:
    """What a model and what drafts for it take of both memories together, and the share of each."""
    memory, workload, on_gpu = plan.memory, plan.workload, plan.device != "cpu"
    both = memory.gpu_bytes, memory.pinned_bytes + memory.host_bytes
    drafter = workload.drafter_gpu_bytes, workload.drafter_host_bytes
    gpu, dram = map(format_bytes, both)
    if plan.gpu_memory_bytes is not None:
        gpu += f" of {format_bytes(plan.gpu_memory_bytes)}"
    if dram_bytes:
        dram += f" of {format_bytes(dram_bytes)}"
    lines = [f"{'fits' if fits else 'needs'}: {f'{gpu} GPU memory and ' if on_gpu else ''}{dram} DRAM"]
    if any(drafter):
        of_gpu, of_dram = (
            f"{format_bytes(whole - its)} + {format_bytes(its)}" for whole, its in zip(both, drafter, strict=True)
        )
        lines.append(f"of that model + drafter: {f'{of_gpu} GPU memory, ' if on_gpu else ''}{of_dram} DRAM")
    return lines


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def kv_line(plan: ShownPlan) -> str:
    """What one sequence takes of the cache as it grows, in GPU memory and in DRAM."""
    sizes = (
        f"{context}: " + (f"{format_bytes(gpu)} + {format_bytes(dram)}" if plan.device != "cpu" else format_bytes(dram))
        for context, gpu, dram in plan.kv_by_context()
    )
    places = "DRAM" if plan.device == "cpu" else "GPU memory + DRAM"
    return f"KV cache of one sequence by context, {places}: {', '.join(sizes)}"


def experts_line(workload: Workload) -> str:
    """How many experts a row chooses, and how many of a layer a step and a prompt's chunk are expected to read; empty
    for a dense model."""
    shards = [shard for shard in workload.linears if shard.picks]
    if not shards:
        return ""
    first, rows = shards[0], workload.prefill_chunk
    read = f"{first.touched(rows) * first.units:.1f}".removesuffix(".0")
    return (
        f"experts: a row is computed by {first.picks} of {first.units} in each of {len(shards)} layers, "
        f"{format_bytes(first.unit_bytes)} each; a prompt's {rows} rows together by about {read}"
    )


def prediction_lines(predicted: Prediction, width: int) -> list[str]:
    """Tokens/s of both phases, expected and, where lanes may overlap more than they have been seen to, at most; each
    with its binding resource, on a line of its own where `width` is too narrow; and decode along the context."""
    lines = [f"predicted on {predicted.hardware} ({predicted.objective}):"]
    speeds, reasons = [], []
    for cost in (predicted.decode, predicted.prefill):
        sequences = "1 sequence" if cost.rows == 1 else f"{cost.rows} sequences"
        what = sequences if cost.phase == "decode" else f"{cost.rows} tokens"
        most = (
            f", at most {digits(cost.most_tokens_per_s)}" if cost.most_tokens_per_s > 1.005 * cost.tokens_per_s else ""
        )
        speeds.append(f"  {cost.phase:8s}{digits(cost.tokens_per_s):>10s} tokens/s{most}")
        reasons.append(f"({what} at context {cost.context}; bound by {RESOURCE_WORDS[cost.binding]})")
    is_narrow = any(len(speed) + 2 + len(reason) > width for speed, reason in zip(speeds, reasons, strict=True))
    between = "\n" + " " * PHASE_INDENT if is_narrow else "  "
    for speed, reason in zip(speeds, reasons, strict=True):
        lines += f"{speed}{between}{reason}".splitlines()
    if len(predicted.decode_by_context) > 1:
        curve = ", ".join(f"{cost.context}: {digits(cost.tokens_per_s)}" for cost in predicted.decode_by_context)
        lines.append(f"  decode tokens/s by context: {curve}")
    return lines


def _placements(plan: ShownPlan, is_wide: bool) -> Table:
    is_wide = is_wide or plan.device == "cpu"  # which has few columns
    table = Table(box=None, pad_edge=False, padding=(0, 2 if is_wide else 1, 0, 0))
    headings = dict(enumerate(COLUMNS)) if is_wide else NARROW_COLUMNS
    # Without a GPU there is one lane and one home: nothing to say about a cut.
    shown = (0, 1, 2, 7) if plan.device == "cpu" else tuple(headings)
    for index in shown:
        table.add_column(headings[index], justify="right" if index else "left", no_wrap=True)
    with_formats = is_wide and plan.workload.is_mixed
    if with_formats:
        table.add_column(FORMAT_COLUMN, no_wrap=True)
    linears = [(_linear_row(plan, row), _format(plan, row)) for row in _linear_rows(plan)]
    caches = [(_kv_row(plan, row), plan.workload.kv_dtype) for row in _kv_rows(plan)]
    for cells, name in linears + caches:
        table.add_row(*(cells[index] for index in shown), *((name,) if with_formats else ()))
    return table


def _linear_rows(plan: ShownPlan) -> list[PlanRow]:
    rows = plan_rows(plan.workload.linears, plan.linears)
    return shown_rows(rows, lambda row: (_format(plan, row), *_linear_row(plan, row)[1:]))


def _kv_rows(plan: ShownPlan) -> list[PlanRow]:
    return shown_rows(plan_rows(plan.workload.kv, plan.kv), lambda row: _kv_row(plan, row)[1:])


def _is_wide(plan: ShownPlan, width: int) -> bool:
    """Whether the wide tables fit, so that no number is cut."""
    console = Console(file=io.StringIO(), width=MOST_COLUMNS)
    tables = _placements(plan, True), _memory(plan, True)
    return all(console.measure(table).maximum <= width for table in tables)


def _format(plan: ShownPlan, row: PlanRow) -> str:
    """The weight format of a row of linears; of a mix those in it, of experts that of their down too where it is
    another one."""
    mix, down = plan.workload.format_of(row.shards[0]).split("+"), row.shards[0].down_format
    return "+".join(part.partition("*")[0] for part in mix) + (f", down {down}" if down else "")


def _formats(plan: ShownPlan) -> str:
    """The weight format of every row of linears; the one that most have is named last, and once."""
    rows = {row.label: _format(plan, row) for row in _linear_rows(plan)}
    commonest = Counter(rows.values()).most_common(1)[0][0]
    return "; ".join([*(f"{label} {fmt}" for label, fmt in rows.items() if fmt != commonest), f"others {commonest}"])


def _linear_row(plan: ShownPlan, row: PlanRow) -> tuple[str, ...]:
    placement: LinearPlacement = row.placement
    unit_bytes = row.shards[0].unit_bytes * row.count
    home = f"{placement.gpu_units} + {placement.expert_slots}" if placement.expert_slots else str(placement.gpu_units)
    in_expert_slots = row.count * expert_slot_bytes(row.shards[0], placement)
    return (
        row.label,
        str(row.count),
        str(placement.units),
        home,
        "/".join(map(str, placement.cut(0))),
        "/".join(map(str, placement.cut(NUM_ROW_TIERS - 1))),
        format_bytes(placement.gpu_units * unit_bytes + in_expert_slots),
        format_bytes((placement.units - first_dram_unit(plan.workload, placement)) * unit_bytes),
    )


def _kv_row(plan: ShownPlan, row: PlanRow) -> tuple[str, ...]:
    placement: KvPlacement = row.placement
    gpu = sum(kv_gpu_bytes(plan.workload, shard, placement) for shard in row.shards)
    dram = sum(kv_dram_bytes(plan.workload, shard, placement) for shard in row.shards)
    cut = f"{placement.gpu_kv_heads}/0/{placement.kv_heads - placement.gpu_kv_heads}"
    home = f"{placement.gpu_kv_heads} ({placement.gpu_tokens} tok)" if placement.gpu_kv_heads else "0"
    return (row.label, str(row.count), str(placement.kv_heads), home, cut, cut, format_bytes(gpu), format_bytes(dram))


def _memory(plan: ShownPlan, is_wide: bool) -> Table:
    """Bytes by place and kind; in a narrow terminal a line for each kind."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    by_place = plan.memory.to_dict()
    kinds = [kind for kind in KINDS if any(by_place[place].get(kind) for place in PLACES)]
    if not is_wide:
        places = [place for place in PLACES if by_place[place]]
        for name in ("bytes", *(PLACE_WORDS[place] for place in places)):
            table.add_column(name, justify="left" if name == "bytes" else "right", no_wrap=True)
        for kind in kinds:
            table.add_row(kind, *(format_bytes(by_place[place].get(kind, 0)) for place in places))
        table.add_row("total", *(format_bytes(sum(by_place[place].values())) for place in places))
        return table
    for name in ("bytes", *kinds, "total"):
        table.add_column(name, justify="left" if name == "bytes" else "right", no_wrap=True)
    for place in PLACES:
        if by_place[place]:
            cells = [format_bytes(by_place[place].get(kind, 0)) for kind in kinds]
            table.add_row(PLACE_WORDS[place], *cells, format_bytes(sum(by_place[place].values())))
    return table
