"""Train the small model of `examples/tiny-draft`, which drafts for that of `examples/tiny`, on a CPU, in minutes.

It has the tokens of the large model and learns what that one says: on the text that the large model was trained on, and
on text that the large model wrote itself, it is taught the large model's probabilities and its likeliest token. What is
reported is the share of held-out places where both would say the same. Nothing is downloaded.

    python examples/train_draft.py                     # the committed checkpoint: fixed steps and seed
    python examples/train_draft.py --minutes 2 --out build/draft
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_corpus import gather_documents, split_documents
from tiny_training import BEGIN, END, encode_stream, random_windows, schedule
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

LARGE = Path(__file__).resolve().parent / "tiny"
OUT = Path(__file__).resolve().parent / "tiny-draft"
ARGMAX_SHARE = 0.5  # of the loss: the likeliest token alone, which is what a greedy answer has
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 0}
GREEDY_TEXTS, SAMPLED_TEXTS = 24, 40  # of the large model
WRITTEN_TOKENS, OPENING_TOKENS = 248, 8  # of each, and of what it begins with


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how hard to train; `minutes` (wall clock) takes the place of `steps` when it is given."""

    steps: int = 579
    minutes: float | None = None
    windows: int = 8
    context: int = 256
    learning_rate: float = 4e-3
    seed: int = 0


def make_small(large: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """The untrained small model: two layers of 96, and the vocabulary of the large one."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=large.vocab_size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=large.max_position_embeddings,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=large.bos_token_id,
            eos_token_id=large.eos_token_id,
            pad_token_id=large.pad_token_id,
        )
    )


@torch.no_grad()
def written(large: LlamaForCausalLM, stream: torch.Tensor, texts: int, seed: int, **how: Any) -> torch.Tensor:
    """Texts that the large model writes behind openings from `stream`, one behind the other: int64 [tokens]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    openings = random_windows(stream, OPENING_TOKENS - 1, texts * (OPENING_TOKENS - 1), generator)
    return large.generate(openings, max_new_tokens=WRITTEN_TOKENS, min_new_tokens=WRITTEN_TOKENS, **how).flatten()


def taught_loss(small: LlamaForCausalLM, large: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the large model's probabilities, and with its likeliest token, over int64 [batch, places]."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = large(input_ids=tokens, use_cache=False).logits
        logits = small(input_ids=tokens, use_cache=False).logits
    small_logits, large_logits = (each.float().flatten(0, 1) for each in (logits, wanted))
    soft = functional.cross_entropy(small_logits, large_logits.softmax(-1))
    hard = functional.cross_entropy(small_logits, large_logits.argmax(-1))
    return (1 - ARGMAX_SHARE) * soft + ARGMAX_SHARE * hard


def train(
    model: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], streams: list[torch.Tensor], options: Options
) -> int:
    """Teach `model` in place on windows of each stream in turn; returns the steps done.

    loss_of: the loss of a batch of windows, int64 [windows, context].
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(options.seed)
    start, step, progress, smooth = time.perf_counter(), 0, 0.0, None
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(progress)
        stream = streams[step % len(streams)]
        tokens = random_windows(stream, options.context, options.windows * options.context, generator)
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed_s = time.perf_counter() - start
        progress = step / options.steps if options.minutes is None else elapsed_s / (60 * options.minutes)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}, {elapsed_s:.0f} s, loss {smooth:.3f}", flush=True)
    return step


@torch.no_grad()
def agreement(small: LlamaForCausalLM, large: LlamaForCausalLM, tokens: torch.Tensor, context: int = 256) -> float:
    """The share of places of `tokens` int64 [length] where the likeliest next token is the same."""
    same = total = 0
    for start in range(0, len(tokens), context):
        window = tokens[None, start : start + context]
        mine, its = (model(input_ids=window, use_cache=False).logits.argmax(-1) for model in (small, large))
        same += int((mine == its).sum())
        total += window.shape[1]
    return same / total


README = """\
# tiny-draft: a small model that drafts for `examples/tiny`

Made by `examples/train_draft.py`, which also wrote this page: {layers} layers of {hidden}, {parameters:,} parameters in
bfloat16, the tokens of `examples/tiny` (whose tokenizer is not repeated here). It was taught, for {steps} steps of
{tokens} tokens in {cpu_minutes:.1f} minutes of CPU time, what that model says on its own training text and on text that
it wrote itself.

On the held-out text of `examples/tiny` its likeliest token is the large model's in {held_out:.0%} of all places, and
in greedy answers of that model in {greedy:.0%}. What that is worth depends on the machine: both are so small that
Python and the waking of threads cost more than their weights.

    hetero-attn generate examples/tiny -p "The with statement" --speculate examples/tiny-draft
    python examples/benchmarks/speculation.py --draft examples/tiny-draft
    python examples/train_draft.py                  # train it again; overwrites this folder
"""


def main() -> None:
    """Read the command line, train, write the checkpoint and what was measured."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=Path, default=LARGE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, help="train for so long by the clock, whatever the steps")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    wishes = parser.parse_args()
    options = Options(steps=wishes.steps, minutes=wishes.minutes, seed=wishes.seed)
    tokenizer = Tokenizer.from_file(str(wishes.large / "tokenizer.json"))
    large = LlamaForCausalLM.from_pretrained(wishes.large, dtype=torch.float32).eval()
    documents, _ = gather_documents(None)
    trained, _ = split_documents(documents)
    stream = encode_stream(tokenizer, [f"{BEGIN}{documents[name]}{END}" for name in trained], options.seed)

    cpu_start = time.process_time()
    own = torch.cat(
        [
            written(large, stream, GREEDY_TEXTS, options.seed, **GREEDY),
            written(large, stream, SAMPLED_TEXTS, options.seed + 1, **SAMPLED),
        ]
    )
    small = make_small(large.config, options.seed)
    steps = train(small, partial(taught_loss, small, large), [stream, own], options)
    small.to(torch.bfloat16).save_pretrained(wishes.out)
    cpu_minutes = (time.process_time() - cpu_start) / 60

    small = LlamaForCausalLM.from_pretrained(wishes.out, dtype=torch.float32).eval()
    held_out = torch.tensor(tokenizer.encode((wishes.large / "heldout.txt").read_text("utf-8")).ids)
    greedy = written(large, held_out, GREEDY_TEXTS, options.seed, **GREEDY)
    figures = {"held_out": agreement(small, large, held_out), "greedy": agreement(small, large, greedy)}
    (wishes.out / "README.md").write_text(
        README.format(
            layers=small.config.num_hidden_layers,
            hidden=small.config.hidden_size,
            parameters=small.num_parameters(),
            steps=steps,
            tokens=options.windows * options.context,
            cpu_minutes=cpu_minutes,
            **figures,
        ),
        "utf-8",
    )
    for path in wishes.out.iterdir():
        path.chmod(0o644)
    print(figures)


if __name__ == "__main__":
    main()
