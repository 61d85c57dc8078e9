"""Planted bugs in the kernels of experts: each must change a bit that the right kernel has."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.planted import planted
from tests.support.suite.covering import one_of_each

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")

from gpu_kernels.experts import expert_linear as op
from gpu_kernels.experts import plain_kernel, whole_kernel, whole_parts
from tests.gpu_kernels.test_triton_experts import OTHERS, both, weight_of

pytestmark = pytest.mark.usefixtures("only_interpreted")

FOLDER = Path(whole_kernel.__file__).parent


def check(name: str, rows: int, in_features: int = 256, by_place: bool = False) -> None:
    actual, expected = both("cpu", name, rows, in_features, weight_of(name, in_features), by_place=by_place)
    if name in OTHERS:
        assert (actual - expected).square().sum() <= OTHERS[name] * (expected - 7).square().sum()
    else:
        assert torch.equal(actual, expected)


ONE, TILES = partial(check, rows=1), partial(check, rows=11)
WORDS = ("groups", "code_words")

# name: (file, what of it is used, check, right text, wrong text)
MUTANTS = {
    "an expert's picks begin with the next expert's": (
        "picks", "picks_of", partial(TILES, "q8"), "expert = tl.sum((behind <= tile)", "expert = tl.sum((behind < tile)",
    ),
    "the second tile of an expert is the first again": (
        "picks", "picks_of", partial(check, "q8", rows=40), "(tile - (behind - tiles)) * ROWS", "0",
    ),
    "the first expert of a lane is forgotten": (
        "picks", "picks_of", partial(TILES, "q8"), "starts + first + index + 1", "starts + index + 1",
    ),
    "a weight of another expert": (
        "whole_kernel", None, partial(TILES, "q8"), "expert.to(tl.int64) * expert_stride", "expert.to(tl.int64) * 0",
    ),
    "a pick takes the row of its place": (
        "whole_kernel", None, partial(TILES, "q8"),
        "row = tl.load(sources + places, mask=live_row, other=0) if HAS_SOURCES else tl.where", "row = tl.where",
    ),
    "inputs behind the last pick's are read": (
        "whole_kernel", None, partial(TILES, "q8", by_place=True),
        "else tl.where(live_row, places, place)", "else places",
    ),
    "a row behind an expert's picks is written": (
        "whole_kernel", None, partial(TILES, "q8"), "live_row = places < behind", "live_row = places < behind + 1",
    ),
    "columns of a mix lie at its beginning": (
        "whole_kernel", None, partial(TILES, "q4*1+q8*2", in_features=128), "to = first_column +", "to =",
    ),
    "scales of another row": (
        "whole_kernel", None, partial(TILES, "q4"),
        "factor = tl.load(scales + group * scale_stride + row)", "factor = tl.load(scales + group * scale_stride)",
    ),
    "a half of 16 inputs twice": (
        "whole_parts", "tile_products", partial(TILES, "q6_k"), "tl.where(early, zero, x)", "tl.where(early, x, zero)",
    ),
    "one pick: the second half is the first again": (
        "whole_parts", "pick_products", partial(ONE, "mxfp4"), "run_sum(dots, line, 1, LINES)", "run_sum(dots, line, 0, LINES)",
    ),
    "one pick: inputs of low and high nibbles exchanged": (
        "whole_parts", "pick_products", partial(ONE, "q4"),
        "low_word, high_word = 2 * line, 2 * line + 1", "high_word, low_word = 2 * line, 2 * line + 1",
    ),
    "one pick: groups of a superblock read the first one's codes": (
        "whole_kernel", None, partial(ONE, "q4_k"), "+ HEADER_BYTES + group % TOGETHER *", "+ HEADER_BYTES + 0 *",
    ),
    "minima are forgotten": (
        "groups", "add_group", partial(ONE, "q4_k"), "-_half(bytes2, mask, 32), total)", "0.0, total)",
    ),
    "a product is rounded before it is added": (
        "groups", "add_group", partial(TILES, "q8"), "tl.fma(total, factor, result)", "total * factor + result",
    ),
    "scales are multiplied first": (
        "groups", "add_group", partial(TILES, "q4"),
        "tl.fma(scaled, factor, result)", "tl.fma(d0.to(tl.float32), _half(halves, mask, 0) * factor, result)",
    ),
    "runs are added in the other order": (
        "groups", "add_group", partial(TILES, "q8"),
        "d1.to(tl.float32), _half(bytes2, mask, 32), d0.to(tl.float32) * _half(bytes2, mask, 0)",
        "d0.to(tl.float32), _half(bytes2, mask, 0), d1.to(tl.float32) * _half(bytes2, mask, 32)",
    ),
    "a zero point is not taken off": (
        "groups", "add_group", partial(TILES, "int4_g128"), "16 * at, SIGNED) * (x0 + x1)", "16 * at, SIGNED) * 0",
    ),
    "the sign of a table's entry is lost": (
        *WORDS, partial(ONE, "mxfp4"), "(packed >> 1) & 0x44444444", "(packed >> 1) & 0",
    ),
    "the fifth bit of a code is lost": (*WORDS, partial(ONE, "q5_k"), "(upper & 0x01010101) << 4", "0"),
    "an offset is forgotten": (*WORDS, partial(ONE, "q6_k"), "OFFSET * 0x01010101", "0"),
    "numbers of a table stand one beside": (
        "plain_kernel", None, partial(TILES, "nf4"), "code == entry", "code == entry + 1",
    ),
    "inputs past the last are multiplied": (
        "plain_kernel", None, partial(TILES, "bf16", in_features=100),
        "inside = start + k < in_features", "inside = start + k < in_features + 28",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", one_of_each(MUTANTS, lambda mutant: mutant[:2]))
def test_mutant_is_caught(name, tmp_path, monkeypatch):
    file, helper, check_it, right, wrong = MUTANTS[name]
    check_it()
    mutant = planted.load_mutant(tmp_path, FOLDER / f"{file}.py", right, wrong)
    if helper is None:
        multiply = "multiply_whole" if file == "whole_kernel" else "multiply_plain"
        monkeypatch.setattr(op, multiply, getattr(mutant, multiply))
    else:
        for user in (whole_kernel, whole_parts, plain_kernel):
            monkeypatch.setattr(user, helper, getattr(mutant, helper), raising=False)

    with pytest.raises(AssertionError):
        check_it()
