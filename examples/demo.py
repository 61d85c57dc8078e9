"""The main job on the shipped checkpoint: plan, stream text, report speed; then the same answer from a split model.

    python examples/demo.py [MODEL]

First one lane, the CPU. Then all three lanes, with a GPU memory budget of less than half of the weights: on a machine
without a GPU the GPU lane is emulated, which says nothing about speed and everything about the answer. The tokens of
both runs are compared; exit code 1 if they differ.
"""

import sys
from pathlib import Path

from hetero_attn import LLM, Policy, SamplingParams

TINY = Path(__file__).parent / "tiny"
PROMPT = """Text files
**********

A text file is opened with the built-in function "open()", which returns
a file object. The "with" statement closes the file when its block ends,
also when an exception was raised. Every line is a string that ends with
a newline, and the loop "for line in file" reads one line after another.

The with statement is used to"""
PARAMS = SamplingParams(max_tokens=32, temperature=0.0, repetition_penalty=1.2, ignore_eos=True)
# Small enough that activations of a chunk of the prompt leave room for weights in so small a budget.
POLICY = Policy(prefill_chunk=64)
SETTINGS = {"policy": POLICY, "max_context": 256, "max_batch": 1, "progress": sys.stderr.isatty()}
BUDGET_SHARE_OF_WEIGHTS = 0.45


def section(title: str) -> None:
    """Print a line that begins a part of the demonstration."""
    print(f"\n== {title} ==\n", flush=True)


def stream_answer(llm: LLM) -> tuple[int, ...]:
    """Print the prompt and its answer as it is made, then the speed of both phases; returns the answer's tokens."""
    # The first start on a machine compiles kernels, which would be counted as prefill.
    llm.generate(PROMPT, SamplingParams(max_tokens=2, temperature=0.0))
    print(f"{PROMPT} ->", end="")
    tokens: tuple[int, ...] = ()
    for piece in llm.stream(PROMPT, PARAMS):
        print(piece.text, end="", flush=True)
        tokens += piece.token_ids
        metrics = piece.metrics
    print(f"\n\nprefill {metrics.prompt_tokens:4d} tokens {metrics.prefill_tokens_per_s:9.1f} tokens/s")
    print(f"decode  {metrics.generated_tokens:4d} tokens {metrics.decode_tokens_per_s:9.1f} tokens/s")
    return tokens


def main(model: Path) -> int:
    """Run both parts; returns the exit code."""
    section("1. One lane, the CPU: what is where, how fast it should be, and how fast it is")
    with LLM(model, device="cpu", **SETTINGS) as llm:
        print(llm.plan.table())
        alone = stream_answer(llm)
        budget_bytes = int(llm.plan.workload.weight_bytes * BUDGET_SHARE_OF_WEIGHTS)

    section(f"2. The same prompt on three lanes, GPU memory budget {budget_bytes / 2**20:.1f} MiB")
    print(
        "EMULATED: there is no GPU here. Its lane runs plain torch on the CPU, behind an arena that enforces the\n"
        "budget. The speeds below, predicted and measured, are of no real machine; the answer is what counts.\n"
    )
    with LLM(model, device="emulated", gpu_memory=budget_bytes, **SETTINGS) as llm:
        print(llm.plan.table())
        split = stream_answer(llm)

    section("3. Does placement change the answer?")
    if alone == split:
        print(f"No: all {len(alone)} tokens of the CPU lane and of the three lanes are the same.")
        return 0
    agreeing = next((i for i, pair in enumerate(zip(alone, split)) if pair[0] != pair[1]), min(len(alone), len(split)))
    print(f"YES, and that is a defect: the answers part after {agreeing} tokens.")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY))
