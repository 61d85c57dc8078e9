"""Process-wide torch state never leaks in: default dtype, default device and autocast change neither load nor answer.

A library that another part of a program uses may set them, for good or for a moment, before or after our load.
"""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hetero_attn import LLM, SamplingParams
from tests.support.models.toy import make_checkpoint

ROOT = Path(__file__).parents[3]
PACKAGES = ("hetero_attn", "cpu_kernels", "gpu_kernels", "placement")
PARAMS = SamplingParams(seed=7, max_tokens=6, ignore_eos=True, logit_bias={5: 0.3}, repetition_penalty=1.1, logprobs=1)
# Makers of tensors that follow the default device; those of floats without given values follow the default dtype too.
MAKERS = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "as_tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "linspace",
}
FLOATS = {"empty", "zeros", "ones", "rand", "randn", "eye", "linspace"}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("state"), "qwen3", layers=2, rope="dynamic", max_position_embeddings=64
    )


def load(path, device):
    options = {"dtype": "fp32", "max_context": 96, "num_threads": 1, "progress": False}
    return LLM(path, "auto", None if device == "cpu" else "300KiB", device=device, **options)


def answer(llm):
    return llm.generate("some text to go on with", PARAMS)[0], llm.logits([5, 6, 7])


@pytest.fixture(scope="module")
def expected(path):
    found = {}
    for device in ("cpu", "emulated"):
        with load(path, device) as llm:
            found[device] = answer(llm)
    return found


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("state", STATES)
def test_state_of_the_process_changes_nothing(path, expected, device, state):
    """A load ended with "x is torch.bfloat16", sampling with "item() cannot be called on meta tensors"."""
    with STATES[state](), load(path, device) as llm:
        inside = answer(llm)
    with load(path, device) as llm:
        with STATES[state]():
            later = answer(llm)

    for output, logits in (inside, later):
        assert output.token_ids == expected[device][0].token_ids
        assert output.logprobs == expected[device][0].logprobs
        assert torch.equal(logits, expected[device][1])


def careless_makers(tree):
    """Lines of calls that leave device or dtype to the process; `**settings` may hold them."""
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            continue
        if node.func.value.id != "torch" or node.func.attr not in MAKERS:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None not in given and ("device" not in given or (node.func.attr in FLOATS and "dtype" not in given)):
            yield node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_every_tensor_is_made_with_a_device_and_a_dtype(package):
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        found += [f"{path.relative_to(ROOT)}:{line}" for line in careless_makers(ast.parse(path.read_text()))]

    assert found == []


def test_the_reader_sees_a_careless_maker():
    text = (
        "torch.empty(3)\ntorch.arange(3)\ntorch.zeros(3, device=d)\ntorch.ones(3, **k)\ntorch.tensor([1], device=d)\n"
    )

    assert list(careless_makers(ast.parse(text))) == [1, 2, 3]
