"""What tests of models quantised elsewhere share: a prompt and its logits, a cut over three lanes, and ways to spoil a
tensor of one linear."""

from functools import partial

import torch

from placement import Policy
from tests.support.models.runtime import model_logits, nmse
from tests.support.models.toy import hf_logits

TOKENS = torch.randint(260, (24,), generator=torch.Generator().manual_seed(5)).tolist()
logits = partial(model_logits, tokens=TOKENS)
CUT = "version: 1\nrules:\n  - {match: layers.*, gpu: 0.5, stream: 0.25, cpu: 0.25}\n"
UP = "model.layers.0.mlp.up_proj."


def assert_lanes_agree(held, plain):
    """The CPU alone differs from float32 by the rounding of activations, and three lanes give what it gives."""
    expected = logits(held, kv_dtype="fp32")

    assert nmse(expected, hf_logits(plain, TOKENS)) < 3e-3
    cut = logits(held, device="emulated", policy=Policy.parse(CUT), kv_dtype="fp32")
    assert nmse(cut, expected) <= 1e-4


def without(part):
    return lambda tensors: tensors.pop(UP + part)


def replaced(part, make):
    def change(tensors):
        tensors[UP + part] = make(tensors[UP + part])

    return change


def first_of(value, dtype=None):
    def change(found):
        found = found.clone()
        (found if dtype is None else found.view(dtype)).view(-1)[0] = value
        return found

    return change


def added(name, values):
    return lambda tensors: tensors.__setitem__(name, values)


def one_other(found):
    found = found.clone()
    found[0, 0] ^= 1
    return found
