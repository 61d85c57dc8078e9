"""`hetero-attn quantize`: a model to a GGUF file that loads without quantising again, here and in llama.cpp."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import expect_writable, print_json, read_text

if TYPE_CHECKING:
    from hetero_attn.tools.quantize.write import QuantizedFile

LEAST_BITS, MOST_BITS = 4.0, 16.0


def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF file to write.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(metavar="q8|q6|q5|q4_m|q4", help="How large the file is. Default: q4_m.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Instead: at most so many bits a weight, each linear as it needs them.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text: weights are rounded for it, and --bits measures them on it; - is stdin."),
    ] = None,
    gguf: options.Gguf = None,
    tokenizer: options.Tokenizer = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file of that name.")] = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Quantise a model to a GGUF file in which every linear has the type that loses least for the size."""
    _check(recipe, bits, out)
    from hetero_attn.checkpoints.hub import resolve_model
    from hetero_attn.tools.quantize.write import quantize as write

    if force or not out.exists():
        expect_writable(out)
    text = "" if calibrate is None else _text_of(calibrate)
    _show(write(resolve_model(model, gguf), out, recipe, bits, text, force, threads, tokenizer=tokenizer), as_json)


def _text_of(calibrate: Path) -> str:
    text = read_text(calibrate)
    if not text.strip():
        raise typer.BadParameter(f"--calibrate {calibrate} holds no text; give some thousand words, or leave it out")
    return text


def _check(recipe: str | None, bits: float | None, out: Path) -> None:
    """Raise typer.BadParameter for wishes that no file can meet."""
    if recipe is not None and bits is not None:
        raise typer.BadParameter("--recipe and --bits exclude each other; give one")
    if bits is not None and not LEAST_BITS <= bits <= MOST_BITS:
        raise typer.BadParameter(f"--bits is {bits:g}; give {LEAST_BITS:g} to {MOST_BITS:g}")
    if out.suffix != ".gguf":
        raise typer.BadParameter(f"--out is {out}; a GGUF file's name ends in .gguf")


def _show(made: "QuantizedFile", as_json: bool) -> None:
    """Print what was written, and which types it has."""
    from hetero_attn.tools.quantize.table import table_lines

    table = json.loads(made.table)
    if as_json:
        print_json({"file": str(made.path), "bytes": made.nbytes, "bits": made.bits} | table)
        return
    for line in table_lines(table):
        typer.echo(line)
    typer.echo(f"wrote {made.path}: {made.nbytes / 2**20:.1f} MiB")
