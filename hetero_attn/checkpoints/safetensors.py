"""One safetensors file: its header checked to the last byte, its data read with pread into the caller's buffer.

The header is parsed here rather than by the safetensors library for two reasons: rows go straight into a buffer that
already is the weight's home (pinned memory, a staging buffer) with no copy in between, and an error can name the file
and the number of missing bytes. Nothing is memory-mapped, so a file that is cut off while it loads is an error and not
SIGBUS. A test checks that whatever is accepted here the library accepts too.

Format: header length in 8 little-endian bytes, a JSON header, then the data of all tensors without a gap (safetensors
documentation, "Format").
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# The library reads headers of 100 MB, for which a parser takes minutes and gigabytes. A real file has a few thousand
# tensors and a hundred bytes for each; the marks that JSON needs are counted before it is parsed.
MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 100_000
MAX_VALUES = 10 * MAX_TENSORS
MAX_NAME_CHARACTERS = 500
MAX_DIMENSIONS = 8
MAX_SIZE = 2**62
_LFS_MAGIC = b"version https://git-lfs"
# Bits per element of every dtype of the format: sizes are checked even for dtypes that hetero_attn does not run.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
_BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: safetensors dtype name, shape, and where its bytes are, from the start of the file."""

    file: "SafetensorsFile"
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ColumnsEntry(TensorEntry):
    """Some columns of a matrix in the file as the rows of a tensor, or some items of a vector.

    offset, nbytes: of the matrix, [inputs, columns] or [columns]. The tensor's rows are its columns from `first` on,
    one every `step`.
    """

    columns: int
    first: int
    step: int

    def values(self, dtype: "torch.dtype") -> "torch.Tensor":
        """The tensor [rows, inputs], or [rows]."""
        import torch

        found = torch.empty(self.nbytes // dtype.itemsize, dtype=dtype, device="cpu")
        self.file.read_weights(memoryview(found.view(torch.uint8).numpy()), self.offset)
        return found.view(*self.shape[1:], self.columns)[..., self.first :: self.step].movedim(-1, 0)


@dataclass(frozen=True, slots=True)
class GroupsEntry(TensorEntry):
    """Rows that come in turn with those of other tensors: of every `group_rows` rows of the file `own_rows`, from
    `first` on.

    offset: of all of them. shape, nbytes: of the tensor's own.
    """

    group_rows: int
    own_rows: int
    first: int

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        """Rows [start, stop) of the tensor."""
        row_bytes, row = self.nbytes // self.shape[0], start
        while row < stop:
            group, inside = divmod(row, self.own_rows)
            count = min(self.own_rows - inside, stop - row)
            at = self.offset + (group * self.group_rows + self.first + inside) * row_bytes
            self.file.read_weights(buffer[(row - start) * row_bytes : (row - start + count) * row_bytes], at)
            row += count


class SafetensorsFile(RawFile):
    """An open file whose header was checked.

    Attributes:
        entries: its tensors by name, in data order.
    """

    kind = "a safetensors file"

    def __init__(self, path: Path):
        """Open `path` and check its header. Raises CheckpointError for anything but a whole safetensors file."""
        super().__init__(path)
        try:
            self.entries = self._read_entries()
        except BaseException:
            self.close()
            raise

    def _read_entries(self) -> dict[str, TensorEntry]:
        """The tensors in data order; every byte of the file belongs to the header or to one of them."""
        size = self.size
        header, data_start = self._header(size)
        items = [(name, *self._header_entry(name, value)) for name, value in header.items() if name != "__metadata__"]
        entries, position = {}, 0
        for name, dtype, shape, begin, end in sorted(items, key=lambda item: item[3:]):
            if begin != position:
                raise CheckpointError(
                    f"{self.path}: tensor {name} starts at data byte {begin}, expected {position}: tensors overlap or "
                    "leave a gap; download the file again"
                )
            entries[name] = TensorEntry(self, dtype, shape, data_start + begin, end - begin)
            position = end
        need = data_start + position
        if size != need:
            problem = f"{need - size} bytes short" if size < need else f"{size - need} bytes too long"
            raise CheckpointError(f"{self.path} is {problem}: {size} bytes, its header says {need}; download it again")
        return entries

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        """(parsed header, where the data starts)."""
        start = bytearray(min(size, 64))
        self.read_into(memoryview(start), 0)
        if start.startswith(_LFS_MAGIC):
            raise CheckpointError(
                f"{self.path}: this is a Git LFS pointer, not the weights; run `git lfs pull` in that directory"
            )
        if size < 8:
            found = f"the file has {size} bytes" if size else "the file is empty"
            raise CheckpointError(f"{self.path}: {found}, expected a safetensors file; download it again")
        length = int.from_bytes(start[:8], "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{self.path}: header of {length} bytes in a file of {size} bytes (at most {MAX_HEADER_BYTES} are "
                "allowed); the file is truncated or no safetensors file, download it again"
            )
        raw = bytearray(length)
        self.read_into(memoryview(raw), 8)
        if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > MAX_VALUES:
            raise CheckpointError(
                f"{self.path}: its header describes more than {MAX_TENSORS} tensors or sizes of too many dimensions; "
                "no model's file does, do not use it"
            )
        try:
            header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: damaged header: {error}; download the file again") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is no JSON object; download the file again")
        return header, 8 + length

    def _header_entry(self, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, begin, end) of one header entry, checked against each other."""
        try:
            dtype, shape, (begin, end) = (
                value["dtype"],
                tuple(value["shape"][: MAX_DIMENSIONS + 1]),
                value["data_offsets"],
            )
            integers = all(type(number) is int and 0 <= number < MAX_SIZE for number in (*shape, begin, end))
            good = integers and begin <= end and len(shape) <= MAX_DIMENSIONS and is_tensor_name(name)
            good = good and math.prod(shape) * _BITS[dtype] == (end - begin) * 8
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise CheckpointError(
                f"{self.path}: header entry of tensor {name[:60]!r} is {_start(value)}, expected a known dtype, a "
                "shape and offsets of just that size, and a printable name; download the file again"
            )
        return dtype, shape, begin, end


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may be called so: a name goes into messages and tables."""
    return 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()


def _start(value: Any) -> str:
    """The first characters of a value; one with a million entries is never written out as a whole."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{str(key)[:20]!r}: {_start(item)}" for key, item in list(value.items())[:4]) + "}"
    return f"{value[:8] if isinstance(value, (list, str)) else value!s:.40}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the same key stands twice")
    return values
