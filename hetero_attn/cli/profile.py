"""`hetero-attn profile`: measure this machine's rates, which later plans then work with."""

from pathlib import Path
from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import expect_writable, print_json, table_width, write_text
from hetero_attn.cli.profile_table import profile_table


def profile(
    save: Annotated[
        Path | None, typer.Option(help="Write a copy, JSON or YAML by its ending, for `plan --hardware` elsewhere.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rates into this PNG, SVG or PDF file.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the result even if other programs used the CPUs meanwhile.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure what this machine's memory, cores and bus can do, and keep it for later plans; takes half a minute on two
    cores, the first time a minute. On a busy machine it says so and keeps nothing unless told to."""
    from hetero_attn import profile_machine

    expect_writable(save, plot)
    measured = profile_machine(on_progress=say, keep_when_busy=keep)
    if as_json:
        print_json(measured.to_dict())
    else:
        typer.echo(profile_table(measured, table_width()), nl=False)
    if save is not None:
        write_text(save, measured.to_yaml() if save.suffix in (".yaml", ".yml") else measured.to_json() + "\n")
    if plot is not None:
        from hetero_attn.cli.plots import plot_profile

        plot_profile(measured, plot)


def say(what: str) -> None:
    """Tell what is measured next, or compiled before."""
    typer.echo(what if what.startswith("compiling ") else f"measuring {what}", err=True)
