"""Train the small checkpoint of `examples/tiny` from text that every CPython carries, on a CPU, in minutes.

A byte-level BPE tokenizer and a Llama-shaped model (grouped-query attention, tied head) learn the text of
`tiny_corpus.py`; about one document in 32 is held out. The result is written in Hugging Face format and measured as
written: weights rounded to bfloat16, loss on the held-out text beside that of a unigram model. Nothing is downloaded.

    python examples/train_tiny.py                     # the committed checkpoint: fixed steps and seed
    python examples/train_tiny.py --minutes 5 --out build/tiny
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_corpus import gather_documents, split_documents
from tiny_training import (
    ASSISTANT,
    BEGIN,
    CONTEXT,
    END,
    PAD,
    SPECIAL_TOKENS,
    USER,
    TrainingOptions,
    encode_stream,
    held_out_loss,
    train,
    training_texts,
    unigram_loss,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SAMPLE_PROMPT = "The with statement is used to"
SAMPLE_QUESTION = "What is json.JSONDecoder?"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can spell any text; encoding puts the begin token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    return tokenizer


def calm_residuals(model: PreTrainedModel) -> None:
    """Scale what each layer adds, so that the residual stream keeps its size at the start."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):  # the last of all experts of a layer
            parameter.data /= math.sqrt(2 * model.config.num_hidden_layers)


def settings_for(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the configs of all models of this tokenizer have in common."""
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }


def make_model(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """Return the untrained float32 model: 4 layers, 8 query heads over 4 KV heads of 32, tied head."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            **settings_for(tokenizer),
        )
    )
    calm_residuals(model)
    return model


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write config, bfloat16 weights, tokenizer, chat template and generation settings into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.max_new_tokens = 128
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BEGIN,
                "eos_token": END,
                "pad_token": PAD,
                "model_max_length": CONTEXT,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, token_ids: list[int], max_tokens: int) -> str:
    """Return the greedy continuation of `token_ids` as text."""
    output = model.generate(torch.tensor([token_ids]), max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(token_ids) :].tolist())


README = """\
# tiny: a small checkpoint that was really trained

Made by `examples/train_tiny.py`, which also wrote this page. It exists so that the demo and the tests have a model
whose output can be read; it knows nothing but the manner of Python's documentation.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {num_layers} layers, hidden {hidden}, MLP {intermediate}, tied head |
| attention | {heads} query heads over {kv_heads} KV heads of {head_dim} |
| parameters | {parameters:,}, stored as bfloat16 |
| context | {context} positions; the last {long_share:.0%} of the steps saw windows of that length, the others 512 |
| tokenizer | byte-level BPE, {vocab_size} tokens; chat template with system, user and assistant turns |
| text | `pydoc_data.topics` and docstrings of the standard library, CPython {python}: {train_tokens:,} tokens |
| training | {steps} steps of {batch_tokens} tokens, AdamW, cosine from {learning_rate:g}, seed {seed} |
| time | {minutes:.1f} minutes ({cpu_minutes:.1f} of CPU time, {threads} threads) |

## Held-out text

`heldout.txt` ({held_out_tokens:,} tokens) is from {held_out_documents} modules and topics that were not trained on.
Windows of 512 tokens, weights rounded to bfloat16, arithmetic in float32:

| | loss (nats per token) | perplexity |
|---|---|---|
| this model | {loss:.4f} | {perplexity:.1f} |
| this model, windows of {context} | {long_loss:.4f} | {long_perplexity:.1f} |
| token frequencies alone | {unigram:.4f} | {unigram_perplexity:.1f} |

## Samples (greedy)

{samples}

## Train it again

    python examples/train_tiny.py                                   # these settings; overwrites this folder
    python examples/train_tiny.py --minutes 5 --out build/tiny      # by the clock

Nothing is downloaded. Another CPython release carries slightly other text, so the figures differ a little.

The text is part of CPython, under the Python Software Foundation License 2; `heldout.txt` quotes from it.
"""


def write_readme(model: LlamaForCausalLM, out: Path, figures: dict) -> None:
    """Write the README of the checkpoint, filled with what was measured."""
    config = model.config
    (out / "README.md").write_text(
        README.format(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            parameters=model.num_parameters(),
            python=sys.version.split()[0],
            threads=torch.get_num_threads(),
            **figures,
        ),
        "utf-8",
    )


def show_samples(model: LlamaForCausalLM, tokenizer: Tokenizer) -> str:
    """Return greedy continuations of a plain prompt and of a chat turn, as indented text."""
    shown = []
    for prompt, token_ids in (
        (SAMPLE_PROMPT, tokenizer.encode(SAMPLE_PROMPT).ids),
        (SAMPLE_QUESTION, tokenizer.encode(f"{USER}{SAMPLE_QUESTION}{END}{ASSISTANT}").ids),
    ):
        text = f"{prompt} ->{greedy(model, tokenizer, token_ids, max_tokens=80)}"
        shown.append("\n".join(f"    {line}".rstrip() for line in text.splitlines()))
    return "\n\n".join(shown)


def measure(model: LlamaForCausalLM, tokenizer: Tokenizer, stream: torch.Tensor, held_out_text: str) -> dict:
    """Return losses (nats per token) and perplexities on the held-out text, its length in tokens, and samples."""
    tokens = tokenizer.encode(held_out_text).ids
    losses = {
        "": held_out_loss(model, tokens),
        "long_": held_out_loss(model, tokens, model.config.max_position_embeddings),
    }
    unigram = unigram_loss(stream, tokens, tokenizer.get_vocab_size())
    return {
        **{f"{kind}loss": loss for kind, loss in losses.items()},
        **{f"{kind}perplexity": math.exp(loss) for kind, loss in losses.items()},
        "unigram": unigram,
        "unigram_perplexity": math.exp(unigram),
        "held_out_tokens": len(tokens),
        "samples": show_samples(model, tokenizer),
    }


def build_checkpoint(out: Path, options: TrainingOptions, source: Path | None = None, vocab_size: int = 4096) -> dict:
    """Do all the steps and write the checkpoint, `heldout.txt` and `README.md` into `out`; return the figures."""
    documents, exchanges = gather_documents(source)
    trained, held_out_text = split_documents(documents)
    tokenizer = train_tokenizer([documents[name] for name in trained], vocab_size)
    texts = training_texts(documents, exchanges, trained)
    stream = encode_stream(tokenizer, texts, options.seed)
    print(f"{len(trained)} documents, {len(stream)} tokens to train on, {len(held_out_text)} characters held out")

    model = make_model(tokenizer, options.seed)
    done = train(model, [stream], options)
    save_checkpoint(model, tokenizer, out)
    (out / "heldout.txt").write_text(held_out_text, "utf-8")

    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    figures = (
        done
        | measure(model, tokenizer, stream, held_out_text)
        | {
            "train_tokens": len(stream),
            "held_out_documents": len(documents) - len(trained),
            "batch_tokens": options.batch_tokens,
            "seed": options.seed,
            "learning_rate": options.learning_rate,
            "long_share": options.long_context_share,
        }
    )
    write_readme(model, out, figures)
    for path in out.iterdir():
        path.chmod(0o644)
    return figures


def main() -> None:
    """Read the command line, train, and print the held-out loss and a sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", help="folder of the checkpoint")
    parser.add_argument("--source", type=Path, help="folder of Python files to read docstrings from (standard library)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (%(default)s)")
    TrainingOptions.add_to(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = build_checkpoint(arguments.out, TrainingOptions.of(arguments), arguments.source, arguments.vocab_size)
    print(
        f"held-out loss {figures['loss']:.4f} (perplexity {figures['perplexity']:.1f}); "
        f"token frequencies alone {figures['unigram']:.4f} (perplexity {figures['unigram_perplexity']:.1f})"
    )
    print(figures["samples"])


if __name__ == "__main__":
    main()
