"""What the subcommands print: JSON for machines, the speed line, text as it arrives."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hetero_attn.cli.shell.streams import decoded
from hetero_attn.tools.whole_file import write_whole

if TYPE_CHECKING:
    from hetero_attn.serving.request import Metrics, Piece, RequestOutput
    from hetero_attn.serving.stream import Stream

NARROWEST_TABLE = 80
MOST_CHARACTERS = 1 << 24  # of a prompt, bytes from stdin; a device behind the name never ends


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table_width() -> int:
    """Columns for a table: those of the terminal, but never so few that numbers are cut."""
    return max(shutil.get_terminal_size((120, 24)).columns, NARROWEST_TABLE)


def remark(text: str) -> None:
    """Say a line beside the results on stderr, broken at words where a terminal shows it; a log keeps it whole."""
    columns = shutil.get_terminal_size((80, 24)).columns
    if len(text) > columns and sys.stderr is not None and sys.stderr.isatty():
        from placement.plan.words import wrapped

        text = wrapped(text, columns)
    typer.echo(text, err=True)


def expect_writable(*files: Path | None) -> None:
    """Raise a usage error for a file that could not be written, before the work whose result it is to hold.

    Its folder is made.
    """
    for file in files:
        if file is None or str(file) == "-":
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            with file.open("ab"):
                pass
        except OSError as error:
            raise typer.BadParameter(f"cannot write {file}: {error.strerror}") from None
        if is_new:
            file.resolve().unlink()  # not a link to it


def write_text(file: Path, text: str) -> None:
    """Write text to a file, or to stdout when the file is `-`; a file that cannot be written is a usage error."""
    if str(file) == "-":
        typer.echo(text, nl=False)
        return
    with writing(file):
        write_whole(file, text)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn a file that cannot be written into a usage error. What was printed before stays a result: print first."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"cannot write {file}: {error.strerror}") from None


def read_text(file: Path) -> str:
    """The text of a file, or of stdin when the file is `-`; one that cannot be read as UTF-8 is a usage error."""
    if str(file) == "-" and sys.stdin is None:
        raise typer.BadParameter("stdin is closed, so nothing can be read from it; give the text itself or a file")
    try:
        if str(file) == "-":
            text = decoded(sys.stdin.buffer.read(MOST_CHARACTERS + 1), sys.stdin.encoding)
        else:
            with file.open(encoding="utf-8") as stream:
                text = stream.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise typer.BadParameter(f"{file} holds more than {MOST_CHARACTERS} characters; give a part of it")
        return text
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None


def speed_line(metrics: Metrics) -> str:
    """Tokens and tokens/s of both phases in one line."""
    cached = f" ({metrics.cached_prompt_tokens} cached)" if metrics.cached_prompt_tokens else ""
    drafts = f"; {metrics.accepted_tokens} of {metrics.drafted_tokens} drafts right" if metrics.drafted_tokens else ""
    decode = f", {metrics.decode_tokens_per_s:.1f} tokens/s" if metrics.decode_tokens_per_s else ""  # of one, none
    first = f"; first token after {metrics.time_to_first_token_s:.2f} s" if metrics.time_to_first_token_s else ""
    return (
        f"prefill {metrics.prompt_tokens} tokens{cached}, {metrics.prefill_tokens_per_s:.1f} tokens/s; "
        f"decode {metrics.generated_tokens} tokens{decode}{drafts}{first}"
    )


def metrics_dict(metrics: Metrics) -> dict[str, float | str]:
    """The same numbers, the seconds behind them, and why there were drafts or none, for JSON."""
    names = (
        "prompt_tokens",
        "cached_prompt_tokens",
        "generated_tokens",
        "prefill_s",
        "decode_s",
        "time_to_first_token_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "drafted_tokens",
        "accepted_tokens",
        "drafts_reason",
    )
    return {name: getattr(metrics, name) for name in names}


def output_dict(output: RequestOutput) -> dict[str, Any]:
    """One generated answer as plain values for JSON."""
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "metrics": metrics_dict(output.metrics),
    }


def print_stream(pieces: Generator[Piece]) -> tuple[str, Piece | None]:
    """Print the pieces of one answer as they arrive.

    Returns the whole text and the last piece; None in its place where Ctrl-C came before the generator could end, which
    is then closed, so that the engine is free for the next request.
    """
    text, last = "", None
    with closing(pieces):
        try:
            for last in pieces:
                typer.echo(last.text, nl=False)
                text += last.text
        except KeyboardInterrupt:
            last = None
    typer.echo()
    return text, last


def finished(pieces: Stream) -> RequestOutput:
    """One whole answer, or as much of it as there was when Ctrl-C came, whose finish_reason is then "abort"."""
    with closing(pieces), suppress(KeyboardInterrupt):
        for _ in pieces:
            pass
    return pieces.output()
