"""Files that are kept for later starts, read as carefully as a stranger's and written whole or not at all.

Whoever can write such a file decides what a later start does: a kernel object is executed, a profile decides how many
threads run. So a file counts only if it is a regular one, small enough, of this user or of root, and nobody else may
write it or its folder. Everything else is an `UnusableFileError`, which the caller answers by doing without the file.
Opening waits for nothing: a FIFO or a device behind the name is refused before it is read.
"""

import os
import stat
import tempfile
import time
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
LEFTOVER_AGE_S = 3600  # what a writer has not renamed after an hour is nobody's


class UnusableFileError(OSError):
    """A kept file or folder that must not or cannot be used; the message is the reason alone, without the name."""


def cache_home() -> Path | None:
    """The user's cache folder; None where there is none, as for a container's user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None


def read_kept(path: Path, most_bytes: int) -> bytes:
    """The content of a kept file.

    Raises FileNotFoundError where there is none, UnusableFileError where it is not to be trusted or cannot be read.
    """
    try:
        check_folder(path.parent)
        # Without O_NONBLOCK a FIFO would wait for a writer; O_NOFOLLOW keeps links to endless devices out.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            _check(status, stat.S_ISREG(status.st_mode), "a regular file")
            if status.st_size > most_bytes:
                raise UnusableFileError(f"it has {status.st_size} bytes, at most {most_bytes} are expected")
            return file.read(most_bytes)
    except (FileNotFoundError, UnusableFileError):
        raise
    except OSError as error:
        raise UnusableFileError(error.strerror or str(error)) from None


def write_kept(path: Path, content: bytes) -> None:
    """Put `content` in place of the file whole, its folder made if missing. Raises UnusableFileError, leaving
    nothing."""
    try:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except UnusableFileError:
        raise
    except OSError as error:
        raise UnusableFileError(error.strerror or str(error)) from None


def make_folder(path: Path) -> None:
    """Make a folder that only this user can enter; one of this user's own that is there is closed for others' writing.

    Raises UnusableFileError for one that is not to be trusted.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022 and status.st_uid == os.getuid():
            path.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    except OSError as error:
        raise UnusableFileError(error.strerror or str(error)) from None
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise UnusableFileError unless this is a folder, no link, that nobody but this user or root can write to."""
    status = path.lstat()
    _check(status, stat.S_ISDIR(status.st_mode), "a folder")


def why_not_writable(path: Path) -> str:
    """Why `write_kept` would fail for this file; empty where it would not. Leaves nothing behind."""
    try:
        make_folder(path.parent)
        if path.is_dir():
            return "it is a folder"
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=TEMPORARY_SUFFIX):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left behind; what cannot be removed stays."""
    try:
        for entry in os.scandir(folder):
            written = entry.name.endswith(TEMPORARY_SUFFIX) or entry.name.startswith("tmp")
            if written and entry.stat(follow_symlinks=False).st_mtime < time.time() - LEFTOVER_AGE_S:
                os.unlink(entry.path)
    except OSError:
        pass


def _check(status: os.stat_result, is_expected: bool, expected: str) -> None:
    if not is_expected:
        raise UnusableFileError(f"it is not {expected}")
    if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
        raise UnusableFileError(f"it belongs to user {status.st_uid}, not to this one")
    if status.st_mode & 0o022:
        raise UnusableFileError(f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})")
