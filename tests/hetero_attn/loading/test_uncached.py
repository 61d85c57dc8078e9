"""Reads past the system's cache: the same bytes from every position, and what they leave alone."""

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from hetero_attn.checkpoints import uncached
from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.checkpoints.uncached import SPARE_BYTES, UncachedReads
from hetero_attn.errors import CheckpointError

SIZE = 5_200_001
PIECE = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no reads past its cache")


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def path(tmp_path, content, monkeypatch):
    """A file on the disk, of many pieces."""
    monkeypatch.setattr(uncached, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(uncached, "LEAST_BYTES", 1)
    with (tmp_path / "weights").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return tmp_path / "weights"


@pytest.fixture
def evict(path):
    def forget():
        """Have the system forget the file."""
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    forget()
    return forget


def opened(path) -> UncachedReads:
    descriptor = os.open(path, os.O_RDONLY)
    return UncachedReads(path, descriptor, SIZE)


@pytest.fixture
def reads(path, evict):
    """Of the file, which no cache holds; skips where the file system refuses."""
    found = opened(path)
    if not found.read_into(np.empty(SIZE, np.uint8), 0):
        pytest.skip("this file system has no reads past the cache, or does not forget")
    yield found
    found.close()


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 4096, 777_777])
@pytest.mark.parametrize("size", [1, 4096, PIECE - 1, PIECE, 3 * PIECE // 2, 3 * PIECE // 2 + 4096, 4_000_000])
def test_bytes_are_those_of_the_file(reads, content, offset, size):
    around = np.full(size + 2, 7, np.uint8)

    assert reads.read_into(around[1:-1], offset)
    assert around[1:-1].tobytes() == content[offset : offset + size]
    assert around[0] == around[-1] == 7


def buffer_for(size: int) -> np.ndarray:
    """Page-aligned memory for so many bytes of a file, of which none is known."""
    return np.frombuffer(mmap.mmap(-1, size + SPARE_BYTES), np.uint8)


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 777_777])
@pytest.mark.parametrize("size", [1, 4096, 3 * PIECE // 2, SIZE - 777_777])
def test_bytes_lie_where_the_disk_has_brought_them_to(reads, content, offset, size):
    memory = buffer_for(size)
    begin = reads.read_within(memory, offset, size)

    assert memory[begin : begin + size].tobytes() == content[offset : offset + size]


@pytest.mark.parametrize("path_is", ["in the cache", "shorter than it was"])
def test_what_cannot_be_read_within_a_buffer_is_left_to_the_caller(path, evict, path_is):
    reads = opened(path)
    if path_is == "in the cache":
        path.read_bytes()
    else:
        os.truncate(path, SIZE // 2)

    assert reads.read_within(buffer_for(SIZE), 0, SIZE) is None


def test_memory_between_pages_is_read_to_through_the_cache(reads, path, content):
    memory = buffer_for(SIZE + 1)[1:]

    assert reads.read_within(memory, 0, SIZE) is None
    assert RawFile(path).read_weights_within(memory, 5, SIZE - 5) == 0
    assert memory[: SIZE - 5].tobytes() == content[5:]


def test_the_end_of_the_file_is_read(reads, content):
    found = np.empty(2_333_333, np.uint8)

    assert reads.read_into(found, SIZE - found.size)
    assert found.tobytes() == content[-found.size :]


def test_nothing_is_left_in_the_cache(reads, path):
    reads.read_into(np.empty(SIZE, np.uint8), 0)
    pages = uncached._CachedPages(os.open(path, os.O_RDONLY), SIZE)

    assert not any(pages.have(offset) for offset in range(0, SIZE, 4096))


def test_what_the_cache_holds_is_left_to_the_caller(path, evict):
    path.read_bytes()
    reads = opened(path)

    assert not reads.read_into(np.empty(SIZE, np.uint8), 0)


@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_where_the_system_refuses_the_caller_reads(path, evict, content, monkeypatch, refusing):
    called = []

    def refuse(*arguments):
        called.append(arguments)
        raise OSError(22, "Invalid argument")

    reads = opened(path)
    monkeypatch.setattr(os, refusing, refuse)

    assert not reads.read_into(np.empty(SIZE, np.uint8), 0)
    assert not reads.read_into(np.empty(SIZE, np.uint8), 0)
    assert len(called) == 1


def test_another_file_of_that_name_is_not_read(path, evict, content):
    """The name may mean another file by the time of the first read."""
    reads = opened(path)
    path.rename(path.with_name("before"))
    path.write_bytes(bytes(SIZE))

    assert not reads.read_into(np.empty(SIZE, np.uint8), 0)


def readings(file):
    """Both ways to read the weights of a file."""
    return (
        lambda: file.read_weights(memoryview(bytearray(SIZE)), 0),
        lambda: file.read_weights_within(buffer_for(SIZE), 0, SIZE),
    )


def test_weights_of_a_file_that_was_cut_off_are_an_error(path, evict):
    file = RawFile(path)
    os.truncate(path, SIZE // 2)

    for read in readings(file):
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            read()


def test_weights_of_a_file_that_was_written_to_are_an_error(path, evict, content):
    file = RawFile(path)
    with path.open("r+b") as other:
        other.write(b"x")
        os.fsync(other.fileno())
    evict()

    for read in readings(file):
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            read()


def test_weights_of_a_closed_file_are_an_error(path):
    file = RawFile(path)
    file.close()

    for read in readings(file):
        with pytest.raises(CheckpointError, match="is closed"):
            read()


def test_threads_read_at_once_each_its_own(path, evict, content):
    reads, found = opened(path), [np.zeros(SIZE, np.uint8) for _ in range(8)]
    threads = [threading.Thread(target=reads.read_into, args=(each, 0)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(each.tobytes() in (content, bytes(SIZE)) for each in found)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has open is listed by Linux's /proc")
def test_closing_leaves_nothing_open(path, evict, content):
    file, found = RawFile(path), bytearray(SIZE)
    file.read_weights(memoryview(found), 0)
    file.close()
    file.close()

    assert found == content
    assert str(path) not in [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert str(path) not in Path("/proc/self/maps").read_text()
