"""`hetero-attn doctor`: what this machine offers, what is in the way, and what to do about it."""

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_json, table_width

NOT_USABLE = 5


def doctor(as_json: options.Json = False) -> None:
    """Look at versions, CPU, memory, GPUs and settings; exit code 5 where something stops hetero-attn from running."""
    from hetero_attn.tools.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table(table_width()), nl=False)
    if not report.usable:
        raise typer.Exit(NOT_USABLE)
