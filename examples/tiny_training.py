"""The loop that the scripts beside this one train with: windows of a stream of tokens, the loss, AdamW, the schedule.

A run that is given a file for its state writes it every hundred steps, and goes on from it when it is there. That file
is no part of a checkpoint.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from tqdm import tqdm

BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = SPECIAL_TOKENS = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|pad|>",
)
CONTEXT = 2048
STEPS_BETWEEN_STATES = 100
PASSED = ("step", "elapsed_s", "cpu_s", "smooth_loss")
LossOf = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How long and how hard to train; `minutes` (wall clock) takes the place of `steps` when it is given."""

    steps: int = 1200
    minutes: float | None = None
    batch_tokens: int = 2048
    short_context: int = 512
    long_context: int = CONTEXT
    long_context_share: float = 0.15  # the last steps see the whole context, so that far positions are trained too
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    decays_vectors: bool = False
    in_bfloat16: bool = True  # products, where the CPU multiplies such numbers faster
    seed: int = 0
    state: Path | None = None  # where an interrupted run is kept, and taken up again

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser, **defaults: float) -> None:
        """Add the options that a command line can set to `parser`, with other defaults for some, and the threads."""
        settings = cls(**defaults)
        parser.add_argument("--steps", type=int, default=settings.steps, help="optimizer steps (%(default)s)")
        parser.add_argument("--minutes", type=float, help="train by the clock instead of by steps")
        parser.add_argument(
            "--batch-tokens", type=int, default=settings.batch_tokens, help="tokens of a step (%(default)s)"
        )
        parser.add_argument("--learning-rate", type=float, default=settings.learning_rate)
        parser.add_argument("--seed", type=int, default=settings.seed)
        parser.add_argument("--state", type=Path, help="file to keep the run in, and to go on from where it is there")
        parser.add_argument(
            "--threads", type=int, default=min(8, os.cpu_count() or 1), help="CPU threads (%(default)s)"
        )

    @classmethod
    def of(cls, arguments: argparse.Namespace, **defaults: float) -> "TrainingOptions":
        """The options that a command line gave, with other defaults for some that it cannot."""
        given = vars(arguments)
        return cls(**defaults | {field.name: given[field.name] for field in fields(cls) if field.name in given})


def training_texts(documents: dict[str, str], exchanges: dict, trained: list[str]) -> list[str]:
    """Return the documents called `trained`, then questions and answers about them, each between its special tokens."""
    # The reference is the better prose, and a fifth of the text: each topic counts twice.
    texts = [f"{BEGIN}{documents[name]}{END}" for name in trained for _ in range(2 if name.startswith("topic ") else 1)]
    return texts + [
        f"{BEGIN}{USER}{question}{END}{ASSISTANT}{answer}{END}"
        for name in trained
        for question, answer in exchanges.get(name, [])
    ]


def encode_stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> torch.Tensor:
    """Return all texts as one int64 stream in a seeded random order."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encodings = tokenizer.encode_batch([texts[index] for index in order], add_special_tokens=False)
    return torch.tensor([token_id for encoding in encodings for token_id in encoding.ids])


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy (mean, nats) of `logits` [batch, length, vocab] with `tokens` [batch, length + 1]."""
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def token_losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy (nats) of `tokens` int64 [batch, length + 1]."""
    return next_token_loss(model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens)


def random_windows(stream: torch.Tensor, context: int, batch_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return int64 [windows, context + 1] from random places of `stream`, `batch_tokens` predictions in all."""
    context = min(context, len(stream) - 1)
    offsets = torch.randint(len(stream) - context, (max(1, batch_tokens // context), 1), generator=generator)
    return stream[offsets + torch.arange(context + 1)]


def schedule(progress: float) -> float:
    """Return the share of the learning rate at `progress` in [0, 1): a short warm-up, then a cosine to almost zero."""
    return min(1.0, (progress + 0.002) / 0.04, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """Return AdamW over all parameters, which decays matrices, and vectors where that is asked for."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": options.weight_decay if options.decays_vectors else 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


class Run:
    """A training of `model` on random windows of each stream in turn, and how far it came: steps, seconds, seconds of
    CPU time."""

    def __init__(self, model: nn.Module, streams: Sequence[torch.Tensor], options: TrainingOptions, loss_of: LossOf):
        self.model, self.streams, self.options, self.loss_of = model, streams, options, loss_of
        self.optimizer = make_optimizer(model, options)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step, self.elapsed_s, self.cpu_s, self.smooth_loss = 0, 0.0, 0.0, None
        if options.state is not None and options.state.exists():
            self.read(options.state)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        if self.options.minutes is not None:
            return self.elapsed_s / (60 * self.options.minutes)
        return self.step / self.options.steps

    def advance(self) -> None:
        """Do one step, at the learning rate and with the context of where the run is."""
        start, cpu_start, options = time.perf_counter(), time.process_time(), self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(self.progress)
        is_long = self.progress >= 1 - options.long_context_share
        context = options.long_context if is_long else options.short_context
        stream = self.streams[self.step % len(self.streams)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.in_bfloat16):
            loss = self.loss_of(self.model, random_windows(stream, context, options.batch_tokens, self.generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.smooth_loss = loss.item() if self.smooth_loss is None else 0.95 * self.smooth_loss + 0.05 * loss.item()
        self.step += 1
        self.elapsed_s += time.perf_counter() - start
        self.cpu_s += time.process_time() - cpu_start

    def write(self, path: Path) -> None:
        """Keep all that the next steps depend on in the file `path`."""
        passed = {name: getattr(self, name) for name in PASSED}
        states = {"model": self.model, "optimizer": self.optimizer}
        kept = {name: each.state_dict() for name, each in states.items()} | {"generator": self.generator.get_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(passed | kept, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def read(self, path: Path) -> None:
        """Go on from where `write` was."""
        kept = torch.load(path, weights_only=True)
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.generator.set_state(kept["generator"])
        for name in PASSED:
            setattr(self, name, kept[name])


def train(
    model: nn.Module, streams: Sequence[torch.Tensor], options: TrainingOptions, loss_of: LossOf = token_losses
) -> dict[str, float]:
    """Train `model` in place on random windows of each stream in turn; return steps done, minutes, and minutes of CPU
    time.

    loss_of: the loss of a model over windows, int64 [windows, context + 1].
    """
    run = Run(model, streams, options, loss_of)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while run.progress < 1.0:
            run.advance()
            bar.update(min(100.0, 100 * run.progress) - bar.n)
            bar.set_postfix(step=run.step, loss=f"{run.smooth_loss:.3f}")
            if options.state is not None and run.step % STEPS_BETWEEN_STATES == 0:
                run.write(options.state)
    return {"steps": run.step, "minutes": run.elapsed_s / 60, "cpu_minutes": run.cpu_s / 60}


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: list[int], context: int = 512) -> float:
    """Return the mean loss (nats per token) of `tokens` in windows of `context` predictions, the last one shorter."""
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = torch.tensor([tokens[start : start + context + 1]])
        total += token_losses(model, window).item() * (window.shape[1] - 1)
    return total / (len(tokens) - 1)


def unigram_loss(stream: torch.Tensor, tokens: list[int], vocab_size: int) -> float:
    """Return the mean loss (nats per token) of `tokens` under the token frequencies of `stream`, one added to each."""
    counts = torch.bincount(stream, minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[torch.tensor(tokens[1:])].mean().item()
