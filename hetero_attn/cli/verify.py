"""`hetero-attn verify`: does the plan give the same answer as one device alone?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_json, read_text

if TYPE_CHECKING:
    from hetero_attn.planning.options import LoadOptions

PROMPT = "The quick brown fox jumps over the lazy dog. In the beginning there was a list of numbers,"
DISAGREES = 5


@options.spread
def verify(
    model: options.Model,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to compare on.")] = PROMPT,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Take the text from a file; - is stdin.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPES",
            help="Instead: perplexity and KL on the text with weights held so (q4,q4_m,q8), beside the model's own.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Instead: the same beside another model, such as the one that a quantised file was made from.",
            show_default=False,
        ),
    ] = None,
    loading: options.Loading,
    as_json: options.Json = False,
) -> None:
    """Compare the plan with a one-device reference, and both with what rounding alone explains; exit 5 if they differ.

    NMSE, KL divergence and the likeliest tokens at the end, and the first layer that differs. Of a long text the first
    512 tokens are compared.
    """
    if quality is not None or against is not None:
        show_quality(loading.options(model), quality or "auto", against, file, as_json)
        return
    from hetero_attn.tools import verify as verification

    text = prompt if file is None else read_text(file)
    if not text:
        raise typer.BadParameter("there is no text to compare on; give some by --prompt or --file")
    with loading.llm(model, needs_text=True) as llm:
        report = verification.run(llm, text)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table().rstrip())
    if not report.passed:
        raise typer.Exit(DISAGREES)


def show_quality(wishes: "LoadOptions", dtypes: str, against: str | None, file: Path | None, as_json: bool) -> None:
    """Print what each of the comma-separated dtypes costs on a text; raises typer.BadParameter for wrong options."""
    from hetero_attn.planning.arguments import check_choice
    from hetero_attn.planning.choices import WEIGHT_DTYPES
    from hetero_attn.tools import quality

    names = [name.strip() for name in dtypes.split(",")]
    for name in (*names, wishes.dtype):
        check_choice("dtype", name, ("auto", *WEIGHT_DTYPES))
    if file is None:
        option = "--quality" if against is None else "--against"
        raise typer.BadParameter(f"{option} reads a text of some thousands of tokens; give it by --file")
    report = quality.run(wishes, read_text(file), names, progress=True, against=against)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table())
