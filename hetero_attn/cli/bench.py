"""`hetero-attn bench`: measured speed beside what the plan predicted and what the machine's ceiling allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import expect_writable, print_json, table_width, writing
from hetero_attn.cli.plan import machine
from hetero_attn.errors import ContextLimitError
from hetero_attn.spec.limits import MAX_CONTEXT

if TYPE_CHECKING:
    from hetero_attn import LLM
    from hetero_attn.planning.options import LoadOptions


@options.spread
def bench(
    model: options.Model,
    *,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=0, help="Prompt of the pp row.")] = 512,
    gen_tokens: Annotated[int, typer.Option("--gen-tokens", "-n", min=0, help="Tokens of the tg row.")] = 128,
    depth: Annotated[list[str] | None, typer.Option("--depth", "-d", help="Tokens in the cache, as 0,1024.")] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="The median is reported.")] = 3,
    loading: options.Loading,
    speculate: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure drafts too: ngram, auto, oracle:SHARE (right drafts, each with this probability), or a small "
            "model of the same vocabulary or an EAGLE-3 head; may be given several times, one model or head at most."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a timeline of the lanes (Chrome trace).")] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            "--simulate",
            metavar="MACHINE",
            help="Measure nothing: a timeline of what would be queued, by the rates of a machine of the catalogue or "
            "of a profile's file; reads no weights.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode as llama-bench does, beside prediction and ceiling."""
    depths = parse_depths(depth or ["0"])
    asked = _Measurement(prompt_tokens, gen_tokens, depths, repetitions, tuple(speculate or ()), trace, as_json)
    drafter = drafting_model(asked.speculate)
    if not (prompt_tokens or gen_tokens):
        raise typer.BadParameter("--prompt-tokens and --gen-tokens are both 0, so there is nothing to measure")
    if speculate and simulate is not None:
        raise typer.BadParameter(
            "--simulate queues what the plan computes, and no drafts: leave --speculate out, or see `plan MODEL "
            "--speculate WISH` for what they would bring"
        )
    if speculate and gen_tokens < 2:
        raise typer.BadParameter(f"--speculate measures decoding; give --gen-tokens of at least 2, not {gen_tokens}")
    needed = asked.needed_tokens
    if str(trace) == "-":
        raise typer.BadParameter("--trace - would put the timeline behind the figures on stdout; name a file")
    expect_writable(trace)
    loading = _in_context_of(needed, asked.way_out, loading)
    with _naming_its_sizes(needed):
        if simulate is not None:
            _simulate(loading.options(model, hardware=machine(simulate)), asked)
            return
        loaded = loading.llm(model, **drafter)
    with loaded as llm:
        _measure(llm, asked)


@dataclass(frozen=True, slots=True)
class _Measurement:
    """What is measured, and where it goes.

    prompt_tokens, gen_tokens: 0 leaves the row out. depths: tokens in the cache. repetitions: of which the median is
    reported. speculate: what drafts. trace: the file of a timeline.
    """

    prompt_tokens: int
    gen_tokens: int
    depths: tuple[int, ...]
    repetitions: int
    speculate: tuple[str, ...]
    trace: Path | None
    as_json: bool

    @property
    def needed_tokens(self) -> int:
        """Tokens of the longest sequence."""
        from hetero_attn.tools.drafts.report import needed_tokens
        from hetero_attn.tools.trace import tokens_traced

        needed = max(self.depths) + max(self.prompt_tokens, self.gen_tokens + 1)
        if self.trace is not None:
            needed = max(needed, tokens_traced(self.prompt_tokens))
        return max(needed, needed_tokens(self.gen_tokens)) if self.speculate else needed

    @property
    def way_out(self) -> str:
        """How a user gets along with fewer tokens."""
        from hetero_attn.tools.drafts.report import needed_tokens

        if not self.speculate:
            return "lower --prompt-tokens, --gen-tokens or --depth"
        return f"leave --speculate out, whose texts and first token take {needed_tokens(0)}"


def _in_context_of(needed: int, way_out: str, loading: options.Loading) -> options.Loading:
    """The options of a load for so many tokens: without a wish of the user the context is what is needed."""
    if needed > MAX_CONTEXT:
        raise typer.BadParameter(
            f"this measurement needs a context of {needed} tokens, and none has more than {MAX_CONTEXT}; {way_out}"
        )
    if loading.context is not None and loading.context < needed:
        raise typer.BadParameter(
            f"--context {loading.context} is less than the {needed} tokens that this measurement needs; give at least "
            f"that, or {way_out}"
        )
    return replace(loading, context=loading.context or needed)


def _measure(llm: LLM, asked: _Measurement) -> None:
    """Measure a loaded model; print, or write, what came out."""
    from hetero_attn.planning.guesses import keep_guesses
    from hetero_attn.tools import bench as benchmark
    from hetero_attn.tools.drafts.report import found_guesses
    from hetero_attn.tools.drafts.report import report as measure_drafts
    from hetero_attn.tools.trace import trace_steps

    sizes = {"prompt_tokens": asked.prompt_tokens, "gen_tokens": asked.gen_tokens}
    report = benchmark.run(llm, **sizes, depths=asked.depths, repetitions=asked.repetitions)
    drafts = None
    if asked.speculate:
        drafts = measure_drafts(llm, asked.speculate, asked.gen_tokens, asked.repetitions)
        keep_guesses(llm.planned.path, found_guesses(drafts.rows))
    if asked.as_json:
        print_json(report.to_dict() | ({} if drafts is None else {"speculation": drafts.to_dict()}))
    else:
        typer.echo(report.table(table_width()).rstrip())
        if drafts is not None:
            typer.echo(f"\n{drafts.table(table_width()).rstrip()}")
    if asked.trace is not None:
        with writing(asked.trace):
            trace_steps(llm.engine, asked.prompt_tokens).save(asked.trace)


@contextmanager
def _naming_its_sizes(needed: int) -> Iterator[None]:
    """Say of a context that the model does not have which options of this command ask for it."""
    try:
        yield
    except ContextLimitError as error:
        raise typer.BadParameter(
            f"this measurement needs a context of {needed} tokens, but the model was made for {error.limit} positions; "
            "lower --prompt-tokens, --gen-tokens or --depth"
        ) from error


def _simulate(wishes: LoadOptions, asked: _Measurement) -> None:
    """Simulate the prompt and a decode step at each depth; print, or write, what came out."""
    from hetero_attn.planning.settle import settle
    from hetero_attn.tools.timeline.report import simulated_table
    from hetero_attn.tools.timeline.simulate import Simulation, save_trace

    planned = settle(wishes)
    if planned.plan.device == "cpu":
        raise typer.BadParameter(
            f"--simulate {planned.hardware.name}: this plan has no GPU whose lanes could be simulated; name a machine "
            "with a GPU, or see `plan` for the CPU's speed"
        )
    simulation = Simulation(planned.config, planned.plan, planned.hardware)
    timelines = [simulation.prompt(asked.prompt_tokens)] if asked.prompt_tokens else []
    timelines += [simulation.decode(depth) for depth in asked.depths] if asked.gen_tokens else []
    if asked.as_json:
        print_json({"machine": planned.hardware.name, "timelines": [timeline.to_dict() for timeline in timelines]})
    else:
        typer.echo(simulated_table(planned.plan, planned.hardware, timelines, table_width()).rstrip())
    if asked.trace is not None:
        with writing(asked.trace):
            save_trace(timelines, asked.trace)


def drafting_model(wishes: Sequence[str]) -> dict[str, str]:
    """The argument of a load that brings a small model or a head along; raises typer.BadParameter for two of them."""
    from hetero_attn.planning.arguments import checked_arguments
    from hetero_attn.tools.drafts.runs import acceptance_of
    from placement.policy.fields import SPECULATIONS

    models = [wish for wish in wishes if acceptance_of(wish) is None and wish not in SPECULATIONS]
    for wish in models:
        checked_arguments(speculate=wish)
    if "off" in wishes or len(models) > 1:
        found = "off, which is measured beside every drafter anyway" if "off" in wishes else " and ".join(models)
        raise typer.BadParameter(
            f"--speculate names {found}; give ngram, auto, oracle:SHARE, or a small model or an EAGLE-3 head, of these "
            "one at most"
        )
    return {"speculate": models[0]} if models else {}


def parse_depths(texts: list[str]) -> tuple[int, ...]:
    """Depths of one or several comma-separated lists; raises typer.BadParameter."""
    words = [word.strip() for text in texts for word in text.split(",")]
    for word in words:
        if not word.isdecimal():
            raise typer.BadParameter(f"--depth: {word!r} is no number of tokens; give a list such as 0,1024,4096")
    return tuple(map(int, words))
