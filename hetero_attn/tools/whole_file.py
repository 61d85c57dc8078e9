"""Result files written whole or not at all: a full disk must not cost what the file held before."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Put content in the place of a file, text as UTF-8; its folder exists.

    Where it cannot be written an OSError that names the file is raised, and what was there stays. What is no regular
    file, such as a pipe, is written as it is; so is a file whose folder takes no other one.
    """
    data = content.encode() if isinstance(content, str) else content
    target = path.resolve()
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        elif _is_taken(partial):
            _replace(partial, target, data)
        else:
            target.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_taken(partial: Path) -> bool:
    """Whether the folder takes a new file, which is then there and empty."""
    try:
        partial.touch()
    except PermissionError:
        return False
    return True


def _replace(partial: Path, target: Path, data: bytes) -> None:
    try:
        partial.write_bytes(data)
        if target.exists():
            partial.chmod(target.stat().st_mode & 0o777)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
