"""A file of weights as bytes: opened once, read with pread, and not trusted to stay the same."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from hetero_attn.checkpoints.uncached import UncachedReads
from hetero_attn.errors import CheckpointError

# Linux sees that reads follow each other, and fetches what comes next in large pages, by what lies before a read in its
# cache: more than the read asks for. What it is told to fetch (POSIX_FADV_WILLNEED) it fetches in small pages.
READ_BYTES = 1 << 20


class Extent(NamedTuple):
    """Bytes that lie in one piece in a file."""

    file: "RawFile"
    offset: int
    nbytes: int


class RawFile:
    """An open file. Owns the descriptor; reading is safe from several threads, as pread has no file position.

    Attributes:
        path: the file. size: its bytes when it was opened. kind: what errors say was expected.
    """

    kind = "a file of weights"

    def __init__(self, path: Path):
        """Open `path`; CheckpointError for anything but a regular file that can be read."""
        self.path = path
        self._fd = _open_regular(path, self.kind)
        self._advise(0, 0, "POSIX_FADV_SEQUENTIAL")
        self._opened_as = self._stamp()
        self.size = self._opened_as[0]
        self._uncached = UncachedReads(path, self._fd, self.size)

    def close(self) -> None:
        """Close the descriptor; may be called twice.

        Where the file and its packed weights do not both fit into memory, the system's copy of the file is given back.
        """
        self._uncached.close()
        if self._fd >= 0:
            import psutil  # compiles its patterns when it is imported

            if psutil.virtual_memory().available < 2 * self.size:
                self._advise(0, self.size, "POSIX_FADV_DONTNEED")
            os.close(self._fd)
            self._fd = -1

    def read_weights(self, buffer: memoryview, offset: int) -> None:
        """As `read_into`, of what is read once: the system's cache is left as it is where that is as fast."""
        if self._fd < 0 or not self._uncached.read_into(np.frombuffer(buffer, np.uint8), offset):
            self.read_into(buffer, offset)
        elif self._stamp() != self._opened_as:
            self._fail_as_changed()

    def read_weights_within(self, buffer: np.ndarray, offset: int, size: int) -> int:
        """As `read_weights`, of `size` bytes that may lie anywhere in `buffer`, uint8 of SPARE_BYTES more, the rest of
        which may hold anything then: where they begin."""
        if self._fd >= 0 and (begin := self._uncached.read_within(buffer, offset, size)) is not None:
            if self._stamp() != self._opened_as:
                self._fail_as_changed()
            return begin
        self.read_into(buffer[:size].data, offset)
        return 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, bytes, from byte `offset` of the file.

        Raises:
            CheckpointError: the file is closed, cannot be read, or changed since it was opened.
        """
        if self._fd < 0:
            raise CheckpointError(f"{self.path}: the checkpoint is closed; open it again")
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done : done + READ_BYTES]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; check the disk") from None
        if done < len(buffer) or self._stamp() != self._opened_as:
            self._fail_as_changed()

    def _fail_as_changed(self) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: the file changed while it was in use (was {self.size} bytes, is {self._stamp()[0]}); "
            "leave a checkpoint alone while it loads, then load it again"
        )

    def _advise(self, offset: int, size: int, advice: str) -> None:
        """Tell the system what will become of bytes of the file, 0 for all behind `offset`, where it can be told."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice that a file system does not take is none the less only advice
                os.posix_fadvise(self._fd, offset, size, getattr(os, advice))

    def _stamp(self) -> tuple[int, int]:
        """Size in bytes and time of the last change; they differ once somebody has written to the file."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


def _open_regular(path: Path, kind: str) -> int:
    """A descriptor for reading; a FIFO or a device behind the name would block or never end, so it is refused first."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file, expected {kind}")
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; check path and permissions") from None
