"""Planted bugs: every mutated kernel must fail the check that the right one passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.planted import planted
from tests.support.suite.covering import one_of_each

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

import gpu_kernels
from gpu_kernels.attention import decode, softmax
from tests.gpu_kernels.mutants import attention as of_attention
from tests.gpu_kernels.mutants import linear as of_linear
from tests.gpu_kernels.mutants import small as of_small
from tests.gpu_kernels.mutants.attention import DECODE, SOFTMAX_MUTANTS
from tests.gpu_kernels.mutants.helpers import HELPER_MUTANTS

pytestmark = pytest.mark.usefixtures("only_interpreted")

ROOT = Path(gpu_kernels.__file__).parent
MUTANTS = of_linear.MUTANTS | of_attention.MUTANTS | of_small.MUTANTS


def load_mutant(folder: Path, file: str, right: str, wrong: str):
    """The module `file` with every occurrence of `right` replaced, as a new module."""
    return planted.load_mutant(folder, ROOT / f"{file}.py", right, wrong)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives; a right result may lie there otherwise
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", one_of_each(MUTANTS, lambda mutant: mutant[:3]))
def test_mutant_is_caught(name, tmp_path):
    file, op, check, right, wrong = MUTANTS[name]
    mutant = load_mutant(tmp_path, file, right, wrong)

    with pytest.raises(AssertionError):
        check(getattr(mutant, op))


@pytest.mark.parametrize(
    "check,file,op",
    dict.fromkeys((check, file, op) for file, op, check, *_ in MUTANTS.values()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_right_kernel_passes_every_mutants_check(check, file, op, tmp_path):
    check(getattr(load_mutant(tmp_path, file, "tl", "tl"), op))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", one_of_each(HELPER_MUTANTS, lambda mutant: (mutant[2], str(mutant[3].keywords))))
def test_mutant_of_a_helper_is_caught(name, tmp_path, monkeypatch):
    file, user, helper, check, right, wrong = HELPER_MUTANTS[name]
    check()
    monkeypatch.setattr(user, helper, getattr(load_mutant(tmp_path, file, right, wrong), helper))

    with pytest.raises(AssertionError):
        check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", one_of_each(SOFTMAX_MUTANTS, lambda mutant: mutant[:2]))
def test_mutant_of_the_softmax_is_caught(name, tmp_path, monkeypatch):
    user, helper, check, right, wrong = SOFTMAX_MUTANTS[name]
    op = user.decode_attention if user is decode else user.prefill_attention
    check(op)
    mutant = planted.load_mutant(tmp_path, Path(softmax.__file__), right, wrong)
    monkeypatch.setattr(user, helper, getattr(mutant, helper))

    with pytest.raises(AssertionError):
        check(op)


@pytest.mark.parametrize(
    "right,wrong",
    [
        ("weights = tl.exp(part_lse - new_maximum[None, :])", "weights = tl.where(present[:, None], 1.0, 0.0)"),
        ("splits < num_splits", "splits < num_splits - 1"),
        ("total = total * correction", "total = total"),
        ("acc * correction[:, None]", "acc"),
        ("(first + splits) * QUERIES_PER_KV", "splits * QUERIES_PER_KV"),
        ("live = heads < QUERIES_PER_KV", "live = heads < HEADS"),
    ],
    ids=[
        "splits are averaged",
        "the last split is dropped",
        "total is not rescaled",
        "sum is not rescaled",
        "splits of another KV head",
        "heads of another KV head",
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutant_of_the_split_merge_is_caught(right, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MERGE_ITEMS", 1)  # in several steps
    monkeypatch.setattr(torch, "empty", torch.zeros)  # NaN written where it must not be would look like the guards
    check = partial(DECODE, queries_per_kv=3)
    check(decode.decode_attention)
    monkeypatch.setattr(
        decode, "merge_splits", load_mutant(tmp_path, "attention/merge_splits", right, wrong).merge_splits
    )

    with pytest.raises(AssertionError):
        check(decode.decode_attention)
