"""Train the small model of `examples/tiny-draft`, which drafts for that of `examples/tiny`, on a CPU, in minutes.

It has the tokens of the large model and learns what that one says: on the text that the large model was trained on, and
on text that the large model wrote itself, it is taught the large model's probabilities and its likeliest token. What is
reported is the share of held-out places where both would say the same. Nothing is downloaded.

    python examples/train_draft.py                     # the committed checkpoint: fixed steps and seed
    python examples/train_draft.py --minutes 2 --out build/draft
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_corpus import gather_documents, split_documents
from tiny_training import BEGIN, END, TrainingOptions, encode_stream, random_windows, train
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

LARGE = Path(__file__).resolve().parent / "tiny"
OUT = Path(__file__).resolve().parent / "tiny-draft"
ARGMAX_SHARE = 0.5  # of the loss: the likeliest token alone, which is what a greedy answer has
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 0}
GREEDY_TEXTS, SAMPLED_TEXTS = 24, 40  # of the large model
WRITTEN_TOKENS, OPENING_TOKENS = 248, 8  # of each, and of what it begins with


# How long and how hard to train, unless the command line says otherwise; the loss itself says what is in bfloat16.
TRAINING = {
    "steps": 579,
    "batch_tokens": 2048,
    "short_context": 256,
    "long_context": 256,
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "decays_vectors": True,
    "in_bfloat16": False,
}


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


def taught_loss(large: LlamaForCausalLM, small: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the large model's probabilities, and with its likeliest token, over int64 [batch, places]."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = large(input_ids=tokens, use_cache=False).logits
        logits = small(input_ids=tokens, use_cache=False).logits
    small_logits, large_logits = (each.float().flatten(0, 1) for each in (logits, wanted))
    soft = functional.cross_entropy(small_logits, large_logits.softmax(-1))
    hard = functional.cross_entropy(small_logits, large_logits.argmax(-1))
    return (1 - ARGMAX_SHARE) * soft + ARGMAX_SHARE * hard


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=Path, default=LARGE)
    parser.add_argument("--out", type=Path, default=OUT)
    TrainingOptions.add_to(parser, **TRAINING)
    wishes = parser.parse_args()
    torch.set_num_threads(wishes.threads)
    options = TrainingOptions.of(wishes, **TRAINING)
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
    steps = train(small, [stream, own], options, partial(taught_loss, large))["steps"]
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
            tokens=options.batch_tokens,
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
