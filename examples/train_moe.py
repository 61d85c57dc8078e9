"""Train the small mixture of experts of `examples/tiny-moe` as `train_tiny.py` trains the dense model, on a CPU.

The text, the tokenizer, the loop and the measure are those of `examples/tiny`; the model is shaped like Qwen3-30B-A3B:
every layer has 32 small MLPs, of which a router chooses four a token. A second term of the loss keeps the router from
choosing the same ones always. Nothing is downloaded.

    python examples/train_moe.py                        # the committed checkpoint: fixed steps and seed
    python examples/train_moe.py --state build/moe.pt   # can be interrupted, and goes on when it is called again
"""

import argparse
import math
from pathlib import Path

import torch
from tiny_corpus import gather_documents, split_documents
from tiny_training import (
    TrainingOptions,
    encode_stream,
    held_out_loss,
    next_token_loss,
    train,
    training_texts,
)
from tokenizers import Tokenizer
from train_tiny import calm_residuals, measure, save_checkpoint, settings_for
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXAMPLES = Path(__file__).resolve().parent
DENSE = EXAMPLES / "tiny"
BALANCE_WEIGHT = 0.01
# In float32: small products in bfloat16 take three times as long on a CPU that has no instructions for it.
SETTINGS = {
    "steps": 2400,
    "batch_tokens": 1024,
    "short_context": 256,
    "long_context": 512,
    "long_context_share": 0.04,
    "in_bfloat16": False,
}


def make_model(tokenizer: Tokenizer, seed: int) -> Qwen3MoeForCausalLM:
    """Return the untrained float32 model: 4 layers, 32 experts of 64, 4 of them a token, tied head."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=160,
            intermediate_size=256,  # of layers without experts, which there are none of
            moe_intermediate_size=64,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            **settings_for(tokenizer),
        )
    )
    calm_residuals(model)
    return model


def imbalance(router_logits: torch.Tensor, picked: int) -> torch.Tensor:
    """Return how far a layer is from choosing its experts equally often: 1 if it does, as many as there are if it never
    changes its choice (Switch Transformer, section 2.2).

    router_logits: [rows, experts]; picked: experts a row.
    """
    experts = router_logits.shape[-1]
    scores = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(picked).indices, 1 / picked)
    return experts * (chosen.mean(0) * scores.mean(0)).sum()


def balanced_loss(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss over `tokens` [batch, length + 1] and, beside it, how unevenly experts were chosen."""
    output = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    layers = [imbalance(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    return next_token_loss(output.logits, tokens) + BALANCE_WEIGHT * sum(layers) / len(layers)


README = """\
# tiny-moe: a small mixture of experts that was really trained

Made by `examples/train_moe.py`, which also wrote this page. It is to models with experts what `examples/tiny` is to
dense ones: what its router chooses depends on the text, where that of a drawn model is noise.

| | |
|---|---|
| architecture | `Qwen3MoeForCausalLM`, {layers} layers, hidden {hidden}, tied head |
| experts | {experts} a layer of {intermediate}, {picked} of them a token |
| attention | {heads} query heads over {kv_heads} KV heads of {head_dim} |
| parameters | {parameters:,}, stored as bfloat16, of which a token reads {active:,} |
| text, tokenizer | those of `examples/tiny` |
| context | {context} positions; windows of {short} tokens, in the last {long_share:.0%} of the steps of {long} |
| training | {steps} steps of {batch_tokens} tokens, AdamW, cosine from {learning_rate:g}, seed {seed} |
| balance | {balance:g} of the loss is how unevenly a layer's experts are chosen |
| time | {minutes:.1f} minutes ({cpu_minutes:.1f} of CPU time, {threads} threads) |

## Held-out text

`heldout.txt` of `examples/tiny` ({held_out_tokens:,} tokens), windows of 512 tokens, weights rounded to bfloat16,
arithmetic in float32:

| | loss (nats per token) | perplexity |
|---|---|---|
| this model | {loss:.4f} | {perplexity:.1f} |
| this model, windows of {context} | {long_loss:.4f} | {long_perplexity:.1f} |
| `examples/tiny`, dense | {dense_loss:.4f} | {dense_perplexity:.1f} |
| token frequencies alone | {unigram:.4f} | {unigram_perplexity:.1f} |

## Samples (greedy)

{samples}

## Train it again

    python examples/train_moe.py --threads {threads}        # these settings; overwrites this folder

Nothing is downloaded. Another CPython release carries slightly other text, so the figures differ a little.
"""


def write_readme(model: Qwen3MoeForCausalLM, options: TrainingOptions, out: Path, figures: dict) -> None:
    """Write the README of the checkpoint, filled with what was measured."""
    config = model.config
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    (out / "README.md").write_text(
        README.format(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            experts=config.num_experts,
            intermediate=config.moe_intermediate_size,
            picked=config.num_experts_per_tok,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=config.max_position_embeddings,
            parameters=model.num_parameters(),
            active=model.num_parameters() - idle * expert,
            threads=torch.get_num_threads(),
            batch_tokens=options.batch_tokens,
            long_share=options.long_context_share,
            short=options.short_context,
            long=options.long_context,
            learning_rate=options.learning_rate,
            seed=options.seed,
            balance=BALANCE_WEIGHT,
            **figures,
        ),
        "utf-8",
    )


def build_checkpoint(out: Path, options: TrainingOptions, source: Path | None = None) -> dict:
    """Train, and write the checkpoint and `README.md` into `out`; return the figures."""
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    documents, exchanges = gather_documents(source)
    stream = encode_stream(tokenizer, training_texts(documents, exchanges, split_documents(documents)[0]), options.seed)
    print(f"{len(stream)} tokens to train on", flush=True)
    model = make_model(tokenizer, options.seed)
    done = train(model, [stream], options, balanced_loss)
    save_checkpoint(model, tokenizer, out)
    # Published checkpoints say `num_experts`, which every release of transformers reads.
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"num_local_experts"', '"num_experts"'))

    held_out_text = (DENSE / "heldout.txt").read_text("utf-8")
    model = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense = LlamaForCausalLM.from_pretrained(DENSE, dtype=torch.float32).eval()
    figures = done | measure(model, tokenizer, stream, held_out_text)
    figures["dense_loss"] = held_out_loss(dense, tokenizer.encode(held_out_text).ids)
    figures["dense_perplexity"] = math.exp(figures["dense_loss"])
    write_readme(model, options, out, figures)
    for path in out.iterdir():
        path.chmod(0o644)
    return figures


def main() -> None:
    """Read the command line, train, and print the held-out loss and a sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXAMPLES / "tiny-moe", help="folder of the checkpoint")
    parser.add_argument("--source", type=Path, help="folder of Python files to read docstrings from (standard library)")
    TrainingOptions.add_to(parser, **SETTINGS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = build_checkpoint(arguments.out, TrainingOptions.of(arguments, **SETTINGS), arguments.source)
    print(
        f"held-out loss {figures['loss']:.4f} (perplexity {figures['perplexity']:.1f}); "
        f"the dense model {figures['dense_loss']:.4f} (perplexity {figures['dense_perplexity']:.1f})"
    )
    print(figures["samples"])


if __name__ == "__main__":
    main()
