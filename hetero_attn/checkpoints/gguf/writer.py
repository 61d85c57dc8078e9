"""Writing a GGUF file: header, metadata and tensor table first, then the data of every tensor, in one pass.

Layout: `file.py`. A file appears under its name when it is whole, or not at all.
"""

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cpu_kernels.formats import GgufType
from hetero_attn.checkpoints.gguf.file import DEFAULT_ALIGNMENT, MAGIC, MAX_NAME_BYTES, VERSIONS
from hetero_attn.errors import CheckpointError

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_INTEGERS = (
    (_UINT32, "<II", 0, 1 << 32),
    (_INT32, "<Ii", -(1 << 31), 0),
    (_UINT64, "<IQ", 0, 1 << 64),
    (_INT64, "<Iq", -(1 << 63), 0),
)
_ARRAY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write: its name in the file, type and shape as torch has it."""

    name: str
    type: GgufType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.type.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    data: Callable[[NewTensor], Iterable[np.ndarray]],
    replace: bool = False,
) -> int:
    """Write a whole GGUF file; returns its bytes.

    Args:
        path: where, behind a link the file that it names; the folder must exist.
        metadata: key -> bool, int, float, str, list of str or numpy array.
        data: gives a tensor's bytes, uint8, piece by piece. replace: whether a file of this name may be written over.

    Raises:
        CheckpointError: a file of that name, too little space, a name that is too long, or data of another size.
    """
    target = path.resolve()
    if target.exists() and not (replace and target.is_file()):
        way_out = "; give another name, or --force to write over it" if target.is_file() else " and is no file"
        raise CheckpointError(f"{path}: this is there already{way_out}")
    header = _header(metadata, tensors)
    total = len(header) + sum(_padded(tensor.nbytes) for tensor in tensors)
    expect_room(path, total)
    unfinished = target.with_name(f".{target.name[:100]}.{os.getpid()}.part")
    try:
        with unfinished.open("xb") as file:
            file.write(header)
            for tensor in tensors:
                _write_tensor(file, tensor, data(tensor))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return total


def expect_room(path: Path, nbytes: int) -> None:
    """CheckpointError where a file has no folder, or its disk no room for it."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; make it first")
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CheckpointError(f"{path}: {nbytes} bytes are to be written and {free} are free there; take another disk")


def _write_tensor(file: BinaryIO, tensor: NewTensor, pieces: Iterable[np.ndarray]) -> None:
    written = 0
    for piece in pieces:
        written += file.write(memoryview(np.ascontiguousarray(piece)).cast("B"))
    if written != tensor.nbytes:
        raise CheckpointError(f"{tensor.name}: {written} bytes of data, expected {tensor.nbytes}")
    file.write(bytes(_padded(written) - written))


def _padded(count: int) -> int:
    return -(-count // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    offset = 0
    for tensor in tensors:
        if len(tensor.name.encode()) >= MAX_NAME_BYTES:
            raise CheckpointError(f"{tensor.name}: a tensor's name has fewer than {MAX_NAME_BYTES} bytes")
        dims = tuple(reversed(tensor.shape))
        parts += [_text(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", tensor.type.type_id, offset))
        offset += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        for kind, code, low, high in _INTEGERS:
            if low <= value < high:
                return struct.pack(code, kind, value)
        raise CheckpointError(f"{key}: {value} has more than the 64 bits of a GGUF file's integers")
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = _BOOL if value.dtype == np.bool_ else _ARRAY_TYPES[value.dtype.str[1:]]
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    raise CheckpointError(f"{key}: a {type(value).__name__} is no value of a GGUF file's metadata")
