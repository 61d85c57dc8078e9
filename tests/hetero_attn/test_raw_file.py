"""What the system is told about a file of weights: what will be read next, and what need not be kept."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hetero_attn.checkpoints.raw_file import RawFile

SIZE = 1 << 16


@pytest.fixture
def advice(monkeypatch) -> list[tuple[int, int, int]]:
    """(offset, bytes, advice) of every call, in order."""
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *call: given.append(call), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    return given


@pytest.fixture
def path(tmp_path) -> Path:
    """A file of SIZE bytes."""
    (tmp_path / "weights").write_bytes(bytes(SIZE))
    return tmp_path / "weights"


def test_a_read_asks_for_what_lies_behind_it(path, advice):
    file = RawFile(path)
    file.read_into(memoryview(bytearray(4096)), 8192)

    assert advice == [(12288, 4096, os.POSIX_FADV_WILLNEED)]


@pytest.mark.parametrize(("available", "is_given_back"), [(2 * SIZE - 1, True), (2 * SIZE, False)])
def test_the_systems_copy_is_given_back_where_memory_is_scarce(path, advice, monkeypatch, available, is_given_back):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    RawFile(path).close()

    assert advice == ([(0, SIZE, os.POSIX_FADV_DONTNEED)] if is_given_back else [])


def test_a_file_system_that_takes_no_advice_is_read_all_the_same(path, monkeypatch):
    def refuse(*call):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    content = bytearray(b"x" * 16)
    RawFile(path).read_into(memoryview(content), 0)

    assert content == bytes(16)
