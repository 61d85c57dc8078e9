"""`hetero-attn plan`: what would live where, and how fast it should be. Reads config and headers, never the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_json, table_width, write_text

if TYPE_CHECKING:
    from placement import HardwareProfile


def plan(
    model: options.Model,
    hardware: Annotated[str | None, typer.Option(help="A machine of the catalogue, or a profile's JSON file.")] = None,
    policy: options.Policy = "auto",
    gpu_memory: options.GpuMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    context: options.Context = None,
    threads: options.Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG, SVG or PDF file.")] = None,
    yaml: Annotated[Path | None, typer.Option(help="Write the plan as a policy to this file; - is stdout.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what of a model would live on which lane, the bytes and the predicted speed."""
    from hetero_attn import plan_model

    made = plan_model(
        model, policy=policy, gpu_memory=gpu_memory, dtype=dtype, device=device, hardware=machine(hardware),
        max_context=context, num_threads=threads,
    )
    if plot is not None:
        from hetero_attn.cli.plots import plot_plan

        plot_plan(made, plot)
    if yaml is not None:
        write_text(yaml, made.to_yaml())
    if as_json:
        print_json(made.to_dict())
    elif str(yaml) != "-":
        typer.echo(made.table(table_width()), nl=False)


def machine(hardware: str | None) -> str | HardwareProfile | None:
    """A profile read from a file, or the name as it is; raises ValueError for a file that holds no profile."""
    if hardware is None or not Path(hardware).is_file():
        return hardware
    from placement import HardwareProfile

    try:
        return HardwareProfile.from_json(Path(hardware).read_text(encoding="utf-8"), hardware)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise typer.BadParameter(f"{hardware} holds no profile: `hetero-attn profile --save` writes one") from None
