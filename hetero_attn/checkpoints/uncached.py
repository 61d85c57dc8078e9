"""Reads past the system's cache: from the disk into huge pages, and from there to where the bytes are wanted.

What goes through the cache is copied by the system too, into memory that it first has to find: 0.1 to over 1 CPU s a
GB. A read past it (O_DIRECT) takes 0.02, leaves nothing behind, and is as fast as the disk where it is of megabytes and
its memory is not scattered. What the cache holds already is left to the caller, who has it sooner from there.
"""

import ctypes
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

PIECE_BYTES = 2 << 20  # about what is read at once
LEAST_BYTES = 256 << 10  # for less the cache, which also fetches what lies beside it, is as good
ALIGNED_BYTES = 4096  # what disks want of positions, sizes and addresses
SPARE_BYTES = 2 * ALIGNED_BYTES  # of memory beside what is read within it


class UncachedReads:
    """Large reads of one open file; safe from several threads. Owns a descriptor of its own, from the first on."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        """descriptor: of the file, which was opened by `path` and has `size` bytes; it stays the caller's."""
        self._path, self._cached, self._size = path, descriptor, size
        self._lock = threading.Lock()
        self._fd: int | None = None  # -1: there is none, or it does not read
        self._pages: _CachedPages | None = None
        self._spare: list[np.ndarray] = []  # memory that no thread reads into
        self._is_refused = False

    def close(self) -> None:
        """Close the descriptor; may be called twice. No read follows."""
        if self._fd is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd, self._pages = -1, None

    def read_into(self, target: np.ndarray, offset: int) -> bool:
        """Fill `target`, uint8, from byte `offset` of the file. False where the caller has to read it: it is small, in
        the cache, or cannot be read so; `target` may hold anything then."""
        if not self._is_wanted(offset, target.size):
            return False
        memory = self._memory()
        try:
            return self._read(target, offset, memory)
        finally:
            self._spare.append(memory)

    def read_within(self, memory: np.ndarray, offset: int, size: int) -> int | None:
        """Read `size` bytes from byte `offset` of the file to `memory`, uint8 of SPARE_BYTES more: where in it they
        begin, None where the caller has to read them. No byte is copied."""
        if memory.ctypes.data % ALIGNED_BYTES or not self._is_wanted(offset, size):
            return None
        begin = offset % ALIGNED_BYTES
        stop = -(-(begin + size) // ALIGNED_BYTES) * ALIGNED_BYTES
        return begin if self._filled(memory[:stop], offset - begin) >= begin + size else None

    def _is_wanted(self, offset: int, size: int) -> bool:
        """Whether bytes are to be read past the cache, and can be."""
        if size < LEAST_BYTES or self._is_refused or self._descriptor() < 0:
            return False
        assert self._pages is not None
        return not (self._pages.have(offset) and self._pages.have(offset + size - 1))

    def _descriptor(self) -> int:
        with self._lock:
            if self._fd is None:
                with suppress(OSError, ValueError):  # not to be mapped, or shorter than it was: read by the caller
                    self._pages = _CachedPages(self._cached, self._size)
                self._fd = -1 if self._pages is None else _opened_uncached(self._path, self._cached)
            return self._fd

    def _memory(self) -> np.ndarray:
        """For half a piece more than a piece."""
        try:
            return self._spare.pop()
        except IndexError:
            import torch

            from cpu_kernels import fresh_memory

            return fresh_memory((2 * PIECE_BYTES,), torch.uint8).numpy()

    def _read(self, target: np.ndarray, offset: int, memory: np.ndarray) -> bool:
        first = offset // ALIGNED_BYTES * ALIGNED_BYTES
        stop = -(-(offset + target.size) // ALIGNED_BYTES) * ALIGNED_BYTES
        count = max(1, round((stop - first) / PIECE_BYTES))  # pieces alike, so that none is a small rest
        step = -(-(stop - first) // count // ALIGNED_BYTES) * ALIGNED_BYTES
        for at in range(first, stop, step):
            begin, end = max(at, offset), min(at + step, offset + target.size)
            if self._filled(memory[: min(step, stop - at)], at) < end - at:
                return False
            np.copyto(target[begin - offset : end - offset], memory[begin - at : end - at])
        return True

    def _filled(self, memory: np.ndarray, offset: int) -> int:
        """How many bytes were read. The file may end before, and a file system may refuse such reads: then nobody asks
        again."""
        assert self._fd is not None
        try:
            return os.preadv(self._fd, [memory.data], offset)
        except OSError:
            self._is_refused = True
            return 0


class _CachedPages:
    """Which pages of a file the system's cache holds: asked by a mapping through which nothing is read."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._mapped = np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
        self._first = self._mapped.ctypes.data
        # Python's lock is kept while it is called: it is over before another thread could have taken that.
        self._mincore = ctypes.PyDLL(None).mincore
        self._mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p

    def have(self, offset: int) -> bool:
        """Whether this byte of the file is there; True also where the system does not tell."""
        page, found = self._first + offset // mmap.PAGESIZE * mmap.PAGESIZE, ctypes.c_ubyte()
        return self._mincore(page, 1, ctypes.byref(found)) != 0 or found.value & 1 == 1


def _opened_uncached(path: Path, descriptor: int) -> int:
    """A descriptor of the same file whose reads pass the cache by; -1 where there is none."""
    if not hasattr(os, "O_DIRECT"):
        return -1
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return -1
    if os.path.samestat(os.fstat(opened), os.fstat(descriptor)):
        return opened
    os.close(opened)
    return -1
