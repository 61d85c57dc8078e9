"""The three streams of the shell in whatever state they are: closed, full, of any encoding."""

import io
import os
import sys

MOST_LINE_BYTES = 1 << 24  # a device behind stdin may hold a line that never ends


class Unheard(io.FileIO):
    """A stream for remarks: what it cannot take is dropped, because no remark is worth a result."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def]  # any buffer
        """Bytes taken; all of them where the stream takes none."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def settle_streams() -> None:
    """Make stdout and stderr writable whatever the shell gave, before anything is said.

    Characters that their encodings do not have are replaced: an answer must not end in its middle. A closed one leads
    nowhere, also by its number, which a file opened later would get otherwise; remarks on stderr are never an error.
    """
    for number in range(3):
        _fill(number)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # open until the end
    elif isinstance(raw := sys.stdout.buffer, io.RawIOBase):
        # PYTHONUNBUFFERED leaves out what writes the rest where a nearly full disk takes a part.
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stdout.encoding, errors="replace", line_buffering=True
        )
    else:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text file has it
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    unheard = io.BufferedWriter(Unheard(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(unheard, encoding, errors="replace", line_buffering=True)


def _fill(number: int) -> None:
    """Open the null device as a descriptor that is closed."""
    try:
        os.fstat(number)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)


def decoded(raw: bytes, encoding: str | None) -> str:
    """Typed or piped bytes as text: UTF-8, else what the terminal says it writes. Raises UnicodeDecodeError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        if encoding is None or encoding.lower() in ("utf-8", "utf8", "ascii", "ansi_x3.4-1968"):
            raise
        return raw.decode(encoding)
