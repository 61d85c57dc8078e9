"""Train the EAGLE-3 head of `examples/tiny-eagle3`, which drafts for `examples/tiny`, on a CPU, in minutes.

The head reads what the large model has behind three of its layers (arXiv 2503.01840) and learns what that model says,
on its training text and on text that it wrote itself. As it will read its own hidden states behind the first draft, it
does so in training: what it made of one place stands in for the large model's hidden states at the next, `DEPTH` times.

    python examples/train_eagle.py                     # the committed head: fixed steps and seed
    python examples/train_eagle.py --minutes 2 --out build/eagle3
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_corpus import gather_documents, split_documents
from tiny_training import BEGIN, END, TrainingOptions, encode_stream, train
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from train_draft import GREEDY, GREEDY_TEXTS, LARGE, SAMPLED, SAMPLED_TEXTS, TRAINING, written
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

OUT = Path(__file__).resolve().parent / "tiny-eagle3"
LAYERS = (0, 1, 2)  # whose outputs are read
DRAFT_VOCAB, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 1024, 256, 4, 2, 32
DEPTH, FADING = 3, 0.8  # drafts in training, and how much less each next one counts


class Head(nn.Module):
    """The head, with the names of its tensors in published checkpoints; it has the large model's embedding."""

    def __init__(self, large: LlamaConfig) -> None:
        super().__init__()
        width, self.eps = large.hidden_size, large.rms_norm_eps
        linear, norm = partial(nn.Linear, bias=False), partial(nn.RMSNorm, width, eps=large.rms_norm_eps)
        self.fc = linear(len(LAYERS) * width, width)
        attention = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        self.midlayer = nn.ModuleDict(
            {
                "input_layernorm": norm(),
                "hidden_norm": norm(),
                "post_attention_layernorm": norm(),
                "self_attn": nn.ModuleDict(
                    {f"{name}_proj": linear(2 * width, rows) for name, rows in attention.items()}
                    | {"o_proj": linear(HEADS * HEAD_DIM, width)}
                ),
                "mlp": nn.ModuleDict(
                    {
                        "gate_proj": linear(width, INTERMEDIATE),
                        "up_proj": linear(width, INTERMEDIATE),
                        "down_proj": linear(INTERMEDIATE, width),
                    }
                ),
            }
        )
        self.norm, self.lm_head = norm(), linear(width, DRAFT_VOCAB)

    def rows(
        self, embedded: torch.Tensor, hidden: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """What the layer makes of [batch, places, width] each; `seen`, keys and values of every depth so far, grows."""
        layer, attention, mlp = self.midlayer, self.midlayer["self_attn"], self.midlayer["mlp"]
        x = torch.cat([layer["input_layernorm"](embedded), layer["hidden_norm"](hidden)], -1)
        q, k, v = (
            attention[f"{name}_proj"](x).unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        seen.append(tuple(each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (turned(k), v)))
        hidden = hidden + attention["o_proj"](attended(turned(q), seen).transpose(1, 2).flatten(2))
        x = layer["post_attention_layernorm"](hidden)
        return hidden + mlp["down_proj"](functional.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [batch, heads, places, HEAD_DIM]."""
    half = HEAD_DIM // 2
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = x.float().split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attended(q: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention at the latest depth: rows made of the large model's hidden states before the first draft, then one row
    of each depth, its own the last."""
    depth, places, scale = len(seen), q.shape[2], HEAD_DIM**-0.5
    keys, values = seen[0][0], seen[0][1].float()
    far = torch.ones(places, places, dtype=torch.bool).tril(1 - depth)
    scores = [(scale * q @ keys.transpose(-1, -2)).masked_fill(~far, -1e9)]
    own = [tuple(each.roll(depth - 1 - index, 2) for each in seen[index]) for index in range(1, depth)]
    scores += [(scale * q * key).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat(scores, -1).softmax(-1)
    out = weights[..., :places] @ values
    for index, (_, value) in enumerate(own):
        out = out + weights[..., places + index, None] * value.float()
    return out


def read_states(output: ModelOutput) -> torch.Tensor:
    """What the head reads of the large model's output, of all places but the last: [batch, places - 1, width of fc]."""
    return torch.cat([output.hidden_states[layer + 1] for layer in LAYERS], -1)[:, :-1]


@torch.autocast("cpu", torch.bfloat16)
def taught_loss(large: LlamaForCausalLM, chosen: torch.Tensor, head: Head, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the large model's probabilities over the `chosen` tokens, every next draft counting less.

    tokens: int64 [batch, places]. A row at place t reads token t + 1 and is to say token t + 2.
    """
    with torch.no_grad():
        output = large(input_ids=tokens, use_cache=False, output_hidden_states=True)
        states = read_states(output)
        wanted = output.logits[:, 1:, chosen].float().softmax(-1)
        embedded = large.model.embed_tokens(tokens[:, 1:])
    hidden, seen, loss = head.fc(states), [], 0.0
    for depth in range(DEPTH):
        hidden = head.rows(embedded, hidden, seen)
        logits = head.lm_head(head.norm(hidden)).float()[:, depth:]
        loss = loss + FADING**depth * functional.cross_entropy(logits.flatten(0, 1), wanted[:, depth:].flatten(0, 1))
        hidden = hidden.roll(1, 1)  # the first places of a deeper draft have none before them, and are left out
    return loss


@torch.no_grad()
def agreement(head: Head, large: LlamaForCausalLM, tokens: torch.Tensor, chosen: torch.Tensor, context: int = 256):
    """The share of places of `tokens` int64 [length] where the first draft is the large model's likeliest token."""
    same = total = 0
    for start in range(0, len(tokens) - 2, context):
        window = tokens[None, start : start + context]
        output = large(input_ids=window, use_cache=False, output_hidden_states=True)
        states = read_states(output)
        hidden = head.rows(large.model.embed_tokens(window[:, 1:]), head.fc(states), [])
        mine = chosen[head.lm_head(head.norm(hidden)).argmax(-1)]
        same += int((mine == output.logits[:, 1:].argmax(-1)).sum())
        total += window.shape[1] - 1
    return same / total


def save(head: Head, large: LlamaConfig, chosen: torch.Tensor, out: Path) -> None:
    """Write the head as published ones are, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    t2d = torch.zeros(large.vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors | {"d2t": chosen - torch.arange(DRAFT_VOCAB), "t2d": t2d}, out / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": large.hidden_size,
        "target_hidden_size": large.hidden_size,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": large.vocab_size,
        "draft_vocab_size": DRAFT_VOCAB,
        "max_position_embeddings": large.max_position_embeddings,
        "rms_norm_eps": large.rms_norm_eps,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


README = """\
# tiny-eagle3: an EAGLE-3 head for `examples/tiny`

Made by `examples/train_eagle.py`, which also wrote this page: {parameters:,} parameters in bfloat16, a vocabulary of
{vocab:,} tokens, the embedding of `examples/tiny`. It was taught what that model says, {steps} steps of {tokens} tokens
in {cpu_minutes:.1f} minutes of CPU time. Its first draft is the large model's likeliest token in {held_out:.0%} of all
places of the held-out text, and in greedy answers of that model in {greedy:.0%}.

    hetero-attn generate examples/tiny -p "The with statement" --speculate examples/tiny-eagle3
    python examples/benchmarks/speculation.py --draft examples/tiny-eagle3
    python examples/train_eagle.py                  # train it again; overwrites this folder
"""


def main() -> None:
    """Read the command line, train, write the head and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=Path, default=LARGE)
    parser.add_argument("--out", type=Path, default=OUT)
    settings = TRAINING | {"steps": 380, "learning_rate": 2e-3}
    TrainingOptions.add_to(parser, **settings)
    wishes = parser.parse_args()
    torch.set_num_threads(wishes.threads)
    options = TrainingOptions.of(wishes, **settings)
    tokenizer = Tokenizer.from_file(str(wishes.large / "tokenizer.json"))
    large = LlamaForCausalLM.from_pretrained(wishes.large, dtype=torch.float32).eval()
    documents, _ = gather_documents(None)
    trained, _ = split_documents(documents)
    stream = encode_stream(tokenizer, [f"{BEGIN}{documents[name]}{END}" for name in trained], options.seed)

    cpu_start = time.process_time()
    kinds = ((GREEDY_TEXTS, GREEDY), (SAMPLED_TEXTS, SAMPLED))
    own = torch.cat([written(large, stream, count, options.seed, **how) for count, how in kinds])
    counts = torch.bincount(stream, minlength=large.config.vocab_size) + torch.bincount(
        own, minlength=large.config.vocab_size
    )
    chosen = counts.topk(DRAFT_VOCAB).indices.sort().values
    torch.manual_seed(options.seed)
    head = Head(large.config)
    steps = train(head, [stream, own], options, partial(taught_loss, large, chosen))["steps"]
    cpu_minutes = (time.process_time() - cpu_start) / 60
    save(head, large.config, chosen, wishes.out)

    head = head.to(torch.bfloat16).float()
    held_out = torch.tensor(tokenizer.encode((wishes.large / "heldout.txt").read_text("utf-8")).ids)
    greedy = written(large, held_out, GREEDY_TEXTS, options.seed, **GREEDY)
    figures = {
        "held_out": agreement(head, large, held_out, chosen),
        "greedy": agreement(head, large, greedy, chosen),
    }
    (wishes.out / "README.md").write_text(
        README.format(
            parameters=sum(each.numel() for each in head.parameters()),
            vocab=DRAFT_VOCAB,
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
