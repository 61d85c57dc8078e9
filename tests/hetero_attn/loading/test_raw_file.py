"""What the system is told about a file of weights: how it will be read, and what need not be kept."""

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
    monkeypatch.setattr(os, "POSIX_FADV_SEQUENTIAL", 2, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    return given


@pytest.fixture
def path(tmp_path) -> Path:
    """A file of SIZE bytes."""
    (tmp_path / "weights").write_bytes(bytes(SIZE))
    return tmp_path / "weights"


def test_the_system_is_told_that_a_file_is_read_from_front_to_back(path, advice):
    RawFile(path)

    assert advice == [(0, 0, os.POSIX_FADV_SEQUENTIAL)]


def test_much_is_read_in_pieces_that_the_system_sees_follow_each_other(path, monkeypatch):
    """Reads of megabytes looked to it like leaps: it then fetched page by page, and nothing ahead."""
    path.write_bytes(content := os.urandom(SIZE))
    monkeypatch.setattr("hetero_attn.checkpoints.raw_file.READ_BYTES", 10_000)
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: asked.append(at) or preadv(fd, buffers, at))
    found = bytearray(25_000)
    RawFile(path).read_into(memoryview(found), 77)

    assert asked == [77, 10_077, 20_077]
    assert found == content[77:25_077]


@pytest.mark.parametrize(("available", "is_given_back"), [(2 * SIZE - 1, True), (2 * SIZE, False)])
def test_the_systems_copy_is_given_back_where_memory_is_scarce(path, advice, monkeypatch, available, is_given_back):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    file = RawFile(path)
    advice.clear()
    file.close()

    assert advice == ([(0, SIZE, os.POSIX_FADV_DONTNEED)] if is_given_back else [])


def test_a_file_system_that_takes_no_advice_is_read_all_the_same(path, monkeypatch):
    def refuse(*call):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_SEQUENTIAL", 2, raising=False)
    content = bytearray(b"x" * 16)
    RawFile(path).read_into(memoryview(content), 0)

    assert content == bytes(16)
