"""`hetero-attn profile`: measure this machine's rates, which later plans then work with."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import expect_writable, print_json, read_text, table_width, write_text


def profile(
    save: Annotated[
        Path | None, typer.Option(help="Write a copy, JSON or YAML by its ending, for `plan --hardware` elsewhere.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rates into this PNG, SVG or PDF file.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the result even if other programs used the CPUs meanwhile.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL", help="Also measure the weight formats and attention of this model."),
    ] = None,
    routes: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Instead: how warm a model's experts stay over --file's text; kept for its plans.",
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The text for --routes; - is stdin.")] = None,
    gguf: options.Gguf = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
) -> None:
    """Measure what this machine's memory, cores and bus can do, and keep it for later plans; takes a quarter of a
    minute on two cores, the first time a minute. On a busy machine it says so and keeps nothing unless told to."""
    loading = options.Loading(gguf=gguf, tokenizer=tokenizer)
    if routes is not None:
        show_routes(routes, loading, file, save, as_json)
        return
    from hetero_attn import profile_machine

    expect_writable(save, plot)
    formats, caches = ((), ()) if model is None else needs_of(model, loading)
    measured = profile_machine(on_progress=say, keep_when_busy=keep, formats=formats, caches=caches)
    if as_json:
        print_json(measured.to_dict())
    else:
        from hetero_attn.cli.profile_table import profile_table

        typer.echo(profile_table(measured, table_width()), nl=False)
    if save is not None:
        write_text(save, measured.to_yaml() if save.suffix in (".yaml", ".yml") else measured.to_json() + "\n")
    if plot is not None:
        from hetero_attn.cli.plots import plot_profile

        plot_profile(measured, plot)


def needs_of(model: str, loading: options.Loading) -> tuple[tuple[str, ...], tuple[tuple[str, int, int], ...]]:
    """What a model needs rates of: its weights' formats and its caches, as they are held here."""
    from hetero_attn.planning.settle import ask

    workload = ask(loading.options(model)).request.workload
    return workload.weight_formats, workload.caches


def show_routes(model: str, loading: options.Loading, file: Path | None, save: Path | None, as_json: bool) -> None:
    """Print how soon the experts of a model are chosen again over a text, and keep it for plans of the model; raises
    typer.BadParameter without a text."""
    if file is None:
        raise typer.BadParameter("--routes follows a text of some hundreds of tokens; give it by --file")
    expect_writable(save)
    from hetero_attn.planning.heats import keep_heat
    from hetero_attn.tools.routes import heat

    text = read_text(file)
    with loading.llm(model, needs_text=True) as llm:
        token_ids = llm.tokenizer.encode(text)[: llm.plan.max_context]
        report = heat.run(llm, token_ids)
        keep_heat(llm.planned.path, {layer.name: layer.heat for layer in report.layers})
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table())
    if save is not None:
        write_text(save, json.dumps(report.to_dict()) + "\n")


def say(what: str) -> None:
    """Tell what is measured next, or compiled before."""
    typer.echo(what if what.startswith("compiling ") else f"measuring {what}", err=True)
