"""The `hetero-attn` command: one file per subcommand, each a thin caller of the Python API.

Nothing heavy is imported before a subcommand needs it, so that `--help` and usage errors answer at once. What a machine
may read goes to stdout; progress, speed and errors go to stderr. Exit codes: 0 done, 2 usage, prompt or policy,
3 checkpoint, 4 memory or plan, 5 at run time, 130 interrupted.
"""

import inspect
import os
import sys
from typing import Annotated

import typer

from hetero_attn.cli import bench, chat, doctor, generate, plan, policy, profile, verify
from hetero_attn.cli.errors import CleanErrors, is_of_the_output, output_lost
from hetero_attn.cli.quantize import command as quantize_command
from hetero_attn.cli.serve import command
from hetero_attn.cli.shell.collector import leave_garbage
from hetero_attn.cli.shell.light_help import draw_lightly
from hetero_attn.cli.shell.streams import settle_streams
from hetero_attn.errors import MemoryBudgetError

app = typer.Typer(
    cls=CleanErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and leave, when --version was given."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"hetero-attn {version('hetero-attn')}")
    except PackageNotFoundError:
        typer.echo("hetero-attn, not installed: running from its sources")
    raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Run language models that do not fit in GPU memory, split over GPU, PCIe and CPU."""


def in_lines(docstring: str | None) -> str:
    """A docstring as help, whose lines are as long as the terminal is wide: a line for each of its paragraphs."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring or "").split("\n\n"))


for subcommand in (
    generate.generate,
    chat.chat,
    plan.plan,
    profile.profile,
    bench.bench,
    verify.verify,
    doctor.doctor,
    quantize_command.quantize,
    command.serve,
):
    app.command(help=in_lines(subcommand.__doc__))(subcommand)
app.add_typer(policy.app, name="policy")


def main() -> None:
    """Entry point of the `hetero-attn` script; leaves through SystemExit."""
    settle_streams()
    draw_lightly(sys.argv[1:])
    try:
        app(prog_name="hetero-attn")
    except (MemoryError, SystemError) as error:  # outside of what a command names, as in reading its own options
        if isinstance(error, SystemError) and "without exception set" not in str(error):
            raise  # else what runs short of memory inside Python itself
        print("error: memory ran out; free some memory, or raise this process's limit", file=sys.stderr)
        sys.exit(MemoryBudgetError.exit_code)
    except OSError as error:  # likewise outside of a command, as where the list of them is printed
        if not is_of_the_output(error):
            raise
        sys.exit(output_lost(error))
    finally:
        leave_quietly()
        leave_garbage()


def leave_quietly() -> None:
    """Let Python's own flush at exit succeed where the last of the output could not be written, which has been said."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
