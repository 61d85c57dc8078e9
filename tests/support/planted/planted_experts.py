"""Errors that an implementation of experts could have, each planted in one operation of the CPU kernels."""

from functools import partial

import torch

from tests.support.models.runtime import cpu_plan, make_engine, run_logits, toy_workload


class Planted:
    """Operations of which one does something else: change(operation, *arguments) runs in its place."""

    def __init__(self, ops, name, change):
        self._ops, self._name, self._change = ops, name, change

    def __getattr__(self, name):
        operation = getattr(self._ops, name)
        return partial(self._change, operation) if name == self._name else operation


def planted_logits(path, planted, tokens, prompt_tokens):
    """What a checkpoint gives for tokens on the CPU with one operation changed; planted: (its name, the change)."""
    engine = make_engine(path, cpu_plan(toy_workload(path)), overlap=False)
    kept = engine.lanes.host_ops
    engine.lanes.host_ops = Planted(kept, *planted)
    try:
        return run_logits(engine, tokens, prompt_tokens)
    finally:
        engine.lanes.host_ops = kept
        engine.close()


def routed_after(change):
    """An error in what `route` writes: change(ids, weights, k)."""

    def planted(route, x, router, scoring, into):
        route(x, router, scoring, into)
        change(into.ids, into.weights, into.ids.shape[1])

    return "route", planted


def with_router(change):
    """An error in the router's product: change(x, router, scoring) -> those that it should have been given."""

    def planted(route, x, router, scoring, into):
        route(*change(x, router, scoring), into)

    return "route", planted


def scored(**changes):
    """An error in how products become weights."""
    return with_router(lambda x, router, scoring: (x, router, scoring._replace(**changes)))


def top_k_first(route, x, router, scoring, into):
    """Softmax over the chosen alone, which is what normalising gives."""
    route(x, router, scoring._replace(normalised=not scoring.normalised), into)


def corrected_weights(route, x, router, scoring, into):
    """The correction in what experts count."""
    route(x, router, scoring, into)
    k = into.ids.shape[1]
    scores = torch.sigmoid(x @ router.T)[:, : into.starts.shape[0] - 1] + scoring.correction
    chosen = scores.gather(1, into.ids.long())
    into.weights[:, :k] = chosen / chosen.sum(-1, keepdim=True)


def rounded_correction(x, router, scoring):
    """The correction as bf16 leaves it in files whose corrections are all about 16, which changes no choice."""
    return x, router, scoring._replace(correction=(scoring.correction + 16).bfloat16().float() - 16)


def without_best(x, router, scoring):
    """The best expert of all rows together out of reach."""
    changed = router.clone()
    changed[(x @ router.T).sum(0).argmax()] = 0
    return x, changed, scoring


def scaled_first(route, x, router, scoring, into):
    """The scale is gone when weights are divided by their sum behind it."""
    route(x, router, scoring, into)
    into.weights[:, :-1] /= into.weights[:, :-1].sum(-1, keepdim=True)


def twice(operation, *arguments):
    operation(*arguments)
    operation(*arguments)


def dropped(operation, *arguments):
    """Nothing."""


def wrong_expert(expert_linear, x, picks, weight, weight_dtype, out):
    expert_linear(x, picks, weight.roll(1, 0), weight_dtype, out)


def wrong_source(expert_linear, x, picks, weight, weight_dtype, out):
    sources = None if picks.sources is None else picks.sources.flip(0)
    expert_linear(x, picks._replace(sources=sources), weight, weight_dtype, out)


def swapped(activation, gate_up, *others):
    activation(gate_up.unflatten(1, (-1, 2, 16)).flip(2).flatten(1), *others)


PITFALLS = {
    "softmax behind the choice, or in front of it": ("qwen2_moe", "route", top_k_first),
    "weights divided by their sum and a little": (
        "mixtral", *routed_after(lambda ids, weights, k: weights[:, :k].div_(1.001)),
    ),
    "router rounded to bf16": (
        "qwen3_moe", *with_router(lambda x, router, *flags: (x, router.bfloat16().float(), *flags)),
    ),
    "input of the router rounded to bf16": (
        "qwen3_moe", *with_router(lambda x, router, *flags: (x.bfloat16().float(), router, *flags)),
    ),
    "weights in the order of another expert": (
        "qwen3_moe", *routed_after(lambda ids, weights, k: weights[:, :k].copy_(weights[:, :k].flip(1))),
    ),
    "a pick dropped": ("olmoe", *routed_after(lambda ids, weights, k: weights[:, :1].zero_())),
    "a pick twice": ("olmoe", *routed_after(lambda ids, weights, k: weights[:, :1].mul_(2))),
    "the factor of the shared expert forgotten": (
        "qwen2_moe", *routed_after(lambda ids, weights, k: weights[:, k:].fill_(1)),
    ),
    "another expert's weights": ("qwen3_moe", "expert_linear", wrong_expert),
    "another row's input": ("qwen3_moe", "expert_linear", wrong_source),
    "gate and up exchanged": ("mixtral", "silu_mul", swapped),
    "gate and up of gpt-oss exchanged": ("gpt_oss", "clamped_silu_mul", swapped),
    "gate and up not clamped": (
        "gpt_oss", "clamped_silu_mul", lambda op, gate_up, alpha, limit, out: op(gate_up, alpha, 99.0, out),
    ),
    "sinks forgotten": ("gpt_oss", "add_sinks", dropped),
    "sinks counted twice": ("gpt_oss", "add_sinks", twice),
    "sinks of other heads": ("gpt_oss", "add_sinks", lambda op, sinks, into: op(sinks.roll(1), into)),
    "biases of experts forgotten": ("gpt_oss", "add_expert_bias", dropped),
    "biases of other experts": (
        "gpt_oss", "add_expert_bias", lambda op, bias, picks, out: op(bias.roll(1, 0), picks, out),
    ),
    "bias of the router forgotten": ("gpt_oss", *scored(bias=None)),
    "correction rounded to bf16": ("glm4_moe", *with_router(rounded_correction)),
    "correction rounded to bf16, without groups": ("minimax_m2", *with_router(rounded_correction)),
    "correction forgotten": ("glm4_moe", *scored(correction=None)),
    "correction weighs too": ("minimax_m2", "route", corrected_weights),
    "all groups kept": ("glm4_moe", *scored(groups=1, kept_groups=1)),
    "weights not scaled": ("glm4_moe", *scored(scale=1.0)),
    "scaled before they are normalised": ("glm4_moe", "route", scaled_first),
    "softmax instead of sigmoids": ("minimax_m2", *scored(sigmoid=False, correction=None)),
    "eps of another model": ("minimax_m2", *scored(eps=1e-3)),
    "norm over all heads forgotten": ("olmoe", "norm_heads", dropped),
}  # fmt: skip
