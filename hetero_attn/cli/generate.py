"""`hetero-attn generate`: one prompt in, text out as it is made, then the speed."""

import sys
from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.errors import INTERRUPTED
from hetero_attn.cli.output import output_dict, print_json, print_stream, speed_line


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads it from stdin.")],
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    seed: options.Seed = 0,
    policy: options.Policy = "auto",
    gpu_memory: options.GpuMemory = None,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    device: options.Device = "auto",
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, printing the text as it is made; the speed goes to stderr."""
    text = sys.stdin.read() if prompt == "-" else prompt
    params = options.sampling_params(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, ignore_eos
    )
    with options.load_llm(model, policy, gpu_memory, dtype, device, context, threads, seed, kv_dtype=kv_dtype) as llm:
        if as_json:
            output = llm.generate([text], params)[0]
            print_json(output_dict(output))
        else:
            _, output = print_stream(llm.stream(text, params))
            if output is not None:
                typer.echo(speed_line(output.metrics), err=True)
    if output is None or output.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)
