"""`hetero-attn verify`: does the plan give the same answer as one device alone?"""

from pathlib import Path
from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_json, read_text

PROMPT = "The quick brown fox jumps over the lazy dog. In the beginning there was a list of numbers,"
DISAGREES = 5


def verify(
    model: options.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to compare on.")] = PROMPT,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Take the text from a file; - is stdin.")] = None,
    policy: options.Policy = "auto",
    gpu_memory: options.GpuMemory = None,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    device: options.Device = "auto",
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Compare the plan with a one-device reference, and both with what rounding alone explains; exit 5 if they differ.

    NMSE, KL divergence and the likeliest tokens at the end, and the first layer that differs. Of a long text the first
    512 tokens are compared.
    """
    from hetero_attn.tools import verify as verification

    text = prompt if file is None else read_text(file)
    with options.load_llm(model, policy, gpu_memory, dtype, device, context, threads, kv_dtype=kv_dtype) as llm:
        report = verification.run(llm, text)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table().rstrip())
    if not report.passed:
        raise typer.Exit(DISAGREES)
