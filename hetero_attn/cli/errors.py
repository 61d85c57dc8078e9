"""Errors as a person at a terminal wants them: one message, an exit code, no traceback.

Only errors that our own packages raise about a user's wishes are treated so. Anything else is a defect, and keeps its
traceback.
"""

import errno
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from hetero_attn.cli.option_words import in_option_words
from hetero_attn.cli.output import remark
from hetero_attn.errors import check_neighbours, printable

OUR_PACKAGES = ("hetero_attn", "placement", "cpu_kernels", "gpu_kernels")
USAGE = 2
# Errors of the planner, which knows of no exit codes.
CODE_BY_NAME = {"BudgetError": 4}
INTERRUPTED = 130
AT_RUN_TIME = 5
OUTPUT_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # what writing to stdout may end with


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that our code raised about what the user asked; None for anything else.

    That is an error type of ours, or a plain ValueError whose innermost frame is ours: by the rule of the code base a
    ValueError speaks of the caller's values, while a broken invariant is an AssertionError.
    """
    if type(error).__module__.partition(".")[0] in OUR_PACKAGES:
        return getattr(error, "exit_code", CODE_BY_NAME.get(type(error).__name__, USAGE))
    return USAGE if isinstance(error, ValueError) and raised_in(error) in OUR_PACKAGES else None


def is_of_the_output(error: BaseException) -> bool:
    """Whether stdout could not take what was printed, as on a full disk."""
    return isinstance(error, OSError) and error.errno in OUTPUT_FAILURES and raised_in(error) not in OUR_PACKAGES


def output_lost(error: BaseException) -> int:
    """Say on stderr that the output could not be written; the exit code for it."""
    typer.echo(f"error: the output cannot be written: {getattr(error, 'strerror', error)}", err=True)
    return AT_RUN_TIME


def raised_in(error: BaseException) -> str:
    """The top-level package whose code raised the error; empty where it was never raised."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


def show_warning(message: Warning | str, *where: object, **options: object) -> None:
    """A warning as one line on stderr, without the place in the code that Python would add."""
    remark(f"warning: {printable(str(message))}")


class CleanErrors(TyperGroup):
    """A command group that reports our errors on stderr and turns them into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; raises typer.Exit for an error of ours and for Ctrl-C."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                check_neighbours()
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if is_of_the_output(error):
                raise typer.Exit(output_lost(error)) from None
            code = exit_code(error)
            if code is None:
                raise error
            message = printable(str(error))
            is_of_a_policy = type(error).__name__ == "PolicyError"  # whose keys are called as arguments are
            typer.echo(f"error: {message if is_of_a_policy else in_option_words(message)}", err=True)
            raise typer.Exit(code) from None
