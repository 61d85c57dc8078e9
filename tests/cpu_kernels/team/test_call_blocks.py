"""What an op tells its kernel is declared once, by name, and both sides read that declaration."""

import re
from pathlib import Path

import pytest

from cpu_kernels.team import arguments
from cpu_kernels.team.arguments import MAX_PARAMETERS, SWEEP, block
from cpu_kernels.team.words import ARGUMENT_BYTES, PARAMETERS, PROGRAM_ENTRY_BYTES

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = {
    name: value for name, value in vars(arguments).items() if isinstance(value, tuple) and hasattr(value, "filled")
}


def test_words_are_filled_by_name_in_the_order_of_their_places():
    assert (SWEEP.scratch, SWEEP.address, SWEEP.size) == (0, 1, 2)
    assert SWEEP.filled(size=7, address=5) == (5, 7)


@pytest.mark.parametrize("words", [{"address": 1}, {"address": 1, "size": 2, "bytes": 3}, {"adress": 1, "size": 2}])
def test_a_word_too_few_too_many_or_unknown_is_an_error(words):
    with pytest.raises(TypeError, match=r"SWEEP\.filled\(\)"):
        SWEEP.filled(**words)


def test_a_word_that_is_not_declared_cannot_be_read():
    with pytest.raises(AttributeError, match="adress"):
        _ = SWEEP.adress


def test_the_longest_declaration_decides_how_much_room_a_call_has():
    """In the team's memory and in a recorded program; a longer op needs no other change."""
    assert max(map(len, BLOCKS.values())) == MAX_PARAMETERS
    assert ARGUMENT_BYTES == PARAMETERS + 8 * MAX_PARAMETERS and PROGRAM_ENTRY_BYTES == 8 + 8 * MAX_PARAMETERS


def test_what_decode_and_prefill_share_has_the_same_places():
    shared = arguments.ATTENTION._fields

    assert arguments.DECODE._fields[: len(shared)] == shared == arguments.PREFILL._fields[: len(shared)]


def test_kernels_read_words_by_name():
    """A bare number is an order that nobody declares."""
    texts = {path: path.read_text() for path in sorted((ROOT / "cpu_kernels").rglob("*.py"))}
    bare = [path.name for path, text in texts.items() if re.search(r"parameter\(arguments, (?![A-Z]+\w*\.)", text)]

    assert bare == [] and sum("parameter(arguments, " in text for text in texts.values()) > 10


def test_a_block_names_each_word_once():
    with pytest.raises(ValueError, match="duplicate"):
        block("TWICE", "x rows", "x")
