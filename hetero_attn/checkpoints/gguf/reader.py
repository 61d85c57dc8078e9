"""The values in a GGUF header: read one after another, every count checked against what is left of the file.

Nothing here knows a model. A count, a length or a type that the file cannot hold is refused before anything is read or
allocated for it, so that a damaged or hostile header costs neither time nor memory. Numbers are little-endian.
"""

import struct
from typing import Any, NoReturn

import numpy as np

from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.errors import CheckpointError

MAX_HEADER_BYTES = 64 << 20  # many times the largest vocabulary
CHUNK_BYTES = 1 << 20
MAX_KEY_BYTES = 1 << 16
# Value types: struct code and numpy dtype of the numbers; 8 is a string, 9 an array.
_NUMBERS = {
    0: ("B", "u1"), 1: ("b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("B", "?"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GgufReader:
    """A position in the header of `file`. Every method raises CheckpointError that names the file and the position."""

    def __init__(self, file: RawFile):
        self._file = file
        self._data = bytearray()
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes of the file behind the position."""
        return self._file.size - self.position

    @property
    def seen(self) -> bytes:
        """The bytes before the position."""
        return bytes(self._data[: self.position])

    def fail(self, problem: str) -> NoReturn:
        """Refuse the file."""
        raise CheckpointError(f"{self._file.path}: {problem} at byte {self.position}; download the file again")

    def number(self, code: str) -> Any:
        """One number of a struct code."""
        size = struct.calcsize(code)
        start = self._take(size, "a number")
        return struct.unpack_from(code, self._data, start)[0]

    def string(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        """A length and as many bytes of UTF-8."""
        length = self.number("<Q")
        if length > min(most, self.remaining):
            self.fail(f"{what} of {length} bytes, at most {min(most, self.remaining)} are possible")
        start = self._take(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, key: str) -> Any:
        """A typed value: a number, bool, str, list of str or numpy array of numbers."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.string(f"the text of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            self.fail(f"{key} has value type {kind}, known are 0 to 12")
        value = self.number(_NUMBERS[kind][0])
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind, count = self.number("<I"), self.number("<Q")
        if kind != _STRING and kind not in _NUMBERS:
            self.fail(f"{key} is an array of type {kind}; arrays of arrays and unknown types are refused")
        item_bytes = 8 if kind == _STRING else np.dtype(_NUMBERS[kind][1]).itemsize
        if count * item_bytes > min(self.remaining, MAX_HEADER_BYTES):
            self.fail(f"{key} claims {count} items, more than the file or a header can hold")
        if kind == _STRING:
            return self._strings(key, count)
        start = self._take(count * item_bytes, key)
        return np.frombuffer(bytes(self._data[start : start + count * item_bytes]), _NUMBERS[kind][1])

    def _strings(self, key: str, count: int) -> list[str]:
        """As `string`, many times: written flat, because vocabularies have hundreds of thousands."""
        found, unpack, data, start = [], struct.Struct("<Q").unpack_from, self._data, self.position
        have = len(data)
        for _ in range(count):
            stop = start + 8
            if stop > have:
                have = self._read_to(start, 8, key)
            (length,) = unpack(data, start)
            if stop + length > have:
                have = self._read_to(start, 8 + length, key)
            try:
                found.append(str(data[stop : stop + length], "utf-8"))
            except UnicodeDecodeError:
                self.position = stop + length
                self.fail(f"item {len(found)} of {key} is not UTF-8")
            start = stop + length
        self.position = start
        return found

    def _read_to(self, start: int, count: int, key: str) -> int:
        """Have an item of `count` bytes from `start` on in `_data`; returns how many bytes there are then."""
        self.position = start
        if count > self.remaining:
            self.fail(f"an item of {key} has {count - 8} bytes, {self.remaining - 8} are left")
        self._take(count, key)
        return len(self._data)

    def _take(self, count: int, what: str) -> int:
        """Move over `count` bytes, which are then in `_data`; returns where they begin."""
        start, stop = self.position, self.position + count
        if stop > self._file.size:
            self.fail(f"the file ends inside {what}")
        if stop > MAX_HEADER_BYTES:
            self.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes")
        if stop > len(self._data):
            have = len(self._data)
            wanted = min(self._file.size, max(stop, have + CHUNK_BYTES))
            more = bytearray(wanted - have)
            self._file.read_into(memoryview(more), have)
            self._data += more
        self.position = stop
        return start
