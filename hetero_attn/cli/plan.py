"""`hetero-attn plan`: what would live where, how fast and why. Reads config and headers, never the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import expect_writable, print_json, table_width, write_text
from hetero_attn.cli.shell.collector import collector_at_rest
from hetero_attn.errors import MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero_attn.cli.shell.second_process import SecondProcess
    from hetero_attn.planning.draft import Drafted
    from hetero_attn.planning.options import LoadOptions
    from hetero_attn.planning.settle import Asked, PlannedModel
    from placement import HardwareProfile
    from placement.explain.explanation import Estimate, Explanation


@options.spread
def plan(
    model: options.Model,
    *,
    hardware: Annotated[
        str | None, typer.Option(help="A machine of the catalogue, or a profile's file, JSON or YAML.")
    ] = None,
    loading: options.Loading,
    explain: Annotated[bool, typer.Option(help="Say what limits the plan, what would help, what was rejected.")] = True,
    plot: Annotated[
        Path | None, typer.Option(help="Draw weights by lane, speed over GPU memory and over context: PNG, SVG or PDF.")
    ] = None,
    plot_points: Annotated[
        int, typer.Option(min=2, help="GPU budgets that --plot plans for; each takes as long as a plan.")
    ] = 9,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="What drafts would bring: off | ngram | auto, or a small model of the same vocabulary, or an EAGLE-3 "
            "head. Default: as the policy says, else off.",
            show_default=False,
        ),
    ] = None,
    yaml: Annotated[Path | None, typer.Option(help="Write the plan as a policy to this file; - is stdout.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what of a model would live on which lane, the bytes and the predicted speed."""
    from hetero_attn.cli.shell.second_process import SecondProcess

    expect_writable(plot, yaml)
    only_policy = str(yaml) == "-"  # a policy on stdout is all that its reader wants
    explain = explain and not only_policy
    with collector_at_rest(), SecondProcess(gains_of, ["placement.explain.explain"]) as beside:
        settle = partial(settled_or_refused, beside=beside if explain else None)
        wishes = loading.options(model, hardware=machine(hardware), speculate=speculate)
        drafted, fits = _planned(wishes, settle, on_stderr=as_json or only_policy)
        explanation = explained(drafted.planned, beside) if explain else None
    if as_json:
        drafts = {} if drafted.wish == "off" else {"speculation": drafted.to_dict()}
        print_json((explanation or drafted.planned.plan).to_dict() | drafts)
    elif not only_policy:
        show(drafted, explanation, fits)
    if yaml is not None:
        write_text(yaml, drafted.planned.plan.to_yaml())
    if plot is not None:
        draw(drafted.planned, plot, plot_points)
    if not fits:
        raise typer.Exit(MemoryBudgetError.exit_code)


def _planned(
    wishes: LoadOptions, settle: Callable[[LoadOptions, Asked], PlannedModel], on_stderr: bool
) -> tuple[Drafted, bool]:
    """What the options ask for, planned, and whether it fits, of which is said what is to be said first."""
    from hetero_attn.engine.measure import refresh_profile
    from hetero_attn.planning.draft import settle_drafted

    if wishes.asks_for_this_machine:
        refresh_profile(lambda: settle_drafted(wishes, settle))
    drafted = settle_drafted(wishes, settle)
    return drafted, _said_to_fit(wishes, drafted, on_stderr)


def _said_to_fit(wishes: LoadOptions, drafted: Drafted, on_stderr: bool) -> bool:
    """Whether the machine has the memory that the plan and what drafts for it need; says first what would fit
    otherwise, and of this machine whether it has it free now."""
    from hetero_attn.engine.host_memory import why_too_large
    from hetero_attn.planning.draft import settle_drafted
    from hetero_attn.planning.fitting import settle_unless_too_large, why_not_fitting, would_fit
    from placement.plan.words import wrapped

    planned = drafted.planned
    unfit = why_not_fitting(planned, "this machine" if wishes.asks_for_this_machine else "")
    if unfit:
        of_this_context = replace(wishes, max_context=planned.plan.max_context)
        ways = would_fit(of_this_context, lambda smaller: settle_drafted(smaller, settle_unless_too_large).planned)
        refusal = wrapped(f"DOES NOT FIT: {unfit}; {ways}", table_width())
        typer.echo(refusal, err=on_stderr)
    if wishes.hardware is None and (reason := why_too_large(*drafted.plans)):
        typer.echo(f"note: this would not load now: {reason}", err=True)
    return not unfit


def show(drafted: Drafted, explanation: Explanation | None, fits: bool) -> None:
    """Print what the plan comes to, its table, and what was found out beside it."""
    from hetero_attn.tools.quantize.table import kept_table
    from placement.plan.table import opening_lines
    from placement.plan.words import wrapped

    width, planned = table_width(), drafted.planned
    opening = opening_lines(planned.plan, fits, planned.hardware.dram_bytes)  # type: ignore[arg-type]
    lines = [*opening, *kept_table(planned.path, planned.headers), "", *planned.plan.table(width).splitlines()]
    drafts_lines = drafted.lines()
    lines += ["", *drafts_lines] if drafts_lines else []
    for line in [*lines, *(explanation.lines() if explanation else ())]:
        typer.echo(wrapped(line, width))


def settled_or_refused(wishes: LoadOptions, asked: Asked, beside: SecondProcess | None = None) -> PlannedModel:
    """The planned model; a budget that no plan can meet is refused with the options that would fit. beside: what is to
    be forked before anything is solved."""
    from hetero_attn.planning.fitting import would_fit
    from hetero_attn.planning.settle import settle

    if beside is not None and asked.device != "cpu":
        beside.fork()
    try:
        return settle(wishes, asked)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"does not fit: {error}; {would_fit(wishes)}") from None


def gains_of(*arguments: Any) -> tuple[Estimate, ...]:
    """What more of each resource would bring: arguments of `gains`."""
    from placement.explain.comparisons import gains

    return tuple(gains(*arguments))


def explained(planned: PlannedModel, beside: SecondProcess) -> Explanation:
    """Plan again with more of each resource, which `beside` does, and with less; takes several times as long as the
    plan."""
    from hetero_attn.serving.progress import working
    from placement.explain.explain import explain

    made = planned.plan
    beside.call(planned.workload, planned.hardware, planned.policy, made)
    with working("looking for what would help"):
        return explain(
            planned.workload,
            planned.hardware,
            planned.policy,
            device=made.device,
            gpu_memory_bytes=made.gpu_memory_bytes,
            searched=planned.searched,
            gains_beside=beside.result,
        )


def draw(planned: PlannedModel, file: Path, points: int) -> None:
    """Draw the plan, and the speeds of plans for so many GPU budgets."""
    from hetero_attn.cli.plots import plot_plan
    from hetero_attn.serving.progress import steps_bar
    from placement.explain.explain import budget_curve

    made, plans = planned.plan, []
    if made.device != "cpu":
        plans = budget_curve(
            planned.workload,
            planned.hardware,
            planned.policy,
            device=made.device,
            steps=points - 1,
            watched=lambda budgets: steps_bar(budgets, "planning for GPU budgets"),
        )
    plot_plan(made, plans, file)


def machine(hardware: str | None) -> str | HardwareProfile | None:
    """A profile read from a file, or the name as it is; raises BadParameter for a file that holds no profile."""
    if hardware is None or not Path(hardware).is_file():
        return hardware
    from placement import HardwareProfile

    try:
        return HardwareProfile.from_file(Path(hardware))
    except ValueError as error:
        raise typer.BadParameter(f"{error}; it holds no profile: `hetero-attn profile --save` writes one") from None
