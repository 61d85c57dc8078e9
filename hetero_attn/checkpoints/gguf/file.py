"""One GGUF file: its header checked to the last byte, its tensors by name with where their bytes are.

Format: magic, version, counts, metadata (key, type, value), tensor table (name, dims with the fastest first, type,
offset), then from the next multiple of the alignment on the data of all tensors in order, each padded to it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_kernels.formats import GGUF_TYPES, GgufType
from hetero_attn.checkpoints.gguf.headers import Entries, GgufHeader, KnownHeaders
from hetero_attn.checkpoints.gguf.reader import MAX_KEY_BYTES, GgufReader
from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS, MAX_NAME_BYTES, MAX_ALIGNMENT = 4, 64, 1 << 20
LEAST_KEY_BYTES, LEAST_TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its file, type, shape as torch has it, and where its bytes are, from the start of the file.

    runs: (first row, rows) of the runs behind `offset` that its rows are made of, in order; None where they are those
    from there on.
    """

    file: RawFile
    type: GgufType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    runs: tuple[tuple[int, int], ...] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a run of the last dimension."""
        return self.type.row_bytes(self.shape[-1])


class GgufFile:
    """An open GGUF file. Close it when its tensors are no longer read.

    Attributes:
        metadata: key -> value. tensors: name -> where it is, in data order.
    """

    def __init__(self, path: Path, known: KnownHeaders | None = None):
        """Open `path` and check its header; CheckpointError for anything but a whole GGUF file.

        known: where the header is found if it was read before, and kept for the next time.
        """
        self.raw = RawFile(path)
        self.path = path
        try:
            self._read_header(GgufReader(self.raw), known or KnownHeaders())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; may be called twice."""
        self.raw.close()

    def _read_header(self, reader: GgufReader, known: KnownHeaders) -> None:
        self._check_start()
        found = known.of(self.raw)
        header = found or self._new_header(reader)
        self.metadata = dict(header.metadata)
        data_start = -(-len(header.text) // header.alignment) * header.alignment
        self.tensors = self._placed(reader, header.entries, data_start, header.alignment)
        if found is None:
            known.remember(header)

    def _new_header(self, reader: GgufReader) -> GgufHeader:
        reader.number("<I")
        version = reader.number("<I")
        if version not in VERSIONS:
            big_endian = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            reader.fail(f"GGUF version is {version}{big_endian}, versions 2 and 3 little-endian are read")
        num_tensors, num_keys = reader.number("<Q"), reader.number("<Q")
        for count, least, what in ((num_keys, LEAST_KEY_BYTES, "keys"), (num_tensors, LEAST_TENSOR_BYTES, "tensors")):
            if count * least > reader.remaining:
                reader.fail(f"the header claims {count} {what}, more than the file can hold")
        metadata = self._read_metadata(reader, num_keys)
        alignment = self._alignment(reader, metadata)
        entries = self._read_table(reader, num_tensors, alignment)
        return GgufHeader(reader.seen, metadata, entries, alignment)

    def _check_start(self) -> None:
        """Say what the file is where it is no GGUF file."""
        start = bytearray(min(self.raw.size, 64))
        self.raw.read_into(memoryview(start), 0)
        if start.startswith(MAGIC) and len(start) >= 24:
            return
        if start.startswith(b"version https://git-lfs"):
            found = "this is a Git LFS pointer, not the weights; run `git lfs pull` in that directory"
        elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            found = "this is an HTML page, not a model; use the file's download address"
        elif start.startswith(MAGIC):
            found = f"the file ends after {self.raw.size} bytes; download it again"
        elif not start:
            found = "the file is empty; download it again"
        else:
            found = (
                f"the file begins with {bytes(start[:4])!r} and not with {MAGIC!r}: no GGUF file; check what was "
                "downloaded"
            )
        raise CheckpointError(f"{self.path}: {found}")

    def _read_metadata(self, reader: GgufReader, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = reader.string("a key", MAX_KEY_BYTES)
            if not key or key in metadata:
                reader.fail(f"key {key[:80]!r} is empty or stands twice")
            metadata[key] = reader.value(key[:80])
        return metadata

    def _alignment(self, reader: GgufReader, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        good = isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
        if not good or isinstance(alignment, bool):
            reader.fail(f"general.alignment is {alignment!r}, expected a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _read_table(self, reader: GgufReader, count: int, alignment: int) -> Entries:
        entries: Entries = {}
        for _ in range(count):
            name = reader.string("a tensor's name", MAX_NAME_BYTES - 1)
            if not name or name in entries:
                reader.fail(f"tensor name {name!r} is empty or stands twice")
            num_dims = reader.number("<I")
            if not 1 <= num_dims <= MAX_DIMS:
                reader.fail(f"tensor {name} has {num_dims} dimensions, 1 to {MAX_DIMS} are possible")
            dims = tuple(reader.number("<Q") for _ in range(num_dims))
            type_id, offset = reader.number("<I"), reader.number("<Q")
            if 0 in dims or math.prod(dims) >= 1 << 63:
                reader.fail(f"tensor {name} has dimensions {list(dims)}")
            if type_id not in GGUF_TYPES:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name} has type {type_id}, which GGUF no longer has or which is newer than "
                    f"this version; known: {', '.join(item.name for item in GGUF_TYPES.values())}"
                )
            if dims[0] % GGUF_TYPES[type_id].items:
                kind = GGUF_TYPES[type_id]
                reader.fail(f"tensor {name} of type {kind.name} has rows of {dims[0]}, no multiple of {kind.items},")
            if offset % alignment:
                reader.fail(f"tensor {name} starts at data byte {offset}, no multiple of {alignment},")
            entries[name] = GGUF_TYPES[type_id], tuple(reversed(dims)), offset
        return entries

    def _placed(
        self,
        reader: GgufReader,
        entries: Entries,
        data_start: int,
        alignment: int,
    ) -> dict[str, GgufTensor]:
        """The tensors with their place in the file: one after the other, without gap, overlap or a byte too many."""
        tensors, position, end = {}, 0, 0
        for name, (kind, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
            nbytes = kind.row_bytes(math.prod(shape))
            if offset != position:
                reader.fail(
                    f"tensor {name} starts at data byte {offset}, expected {position}: tensors overlap or leave a gap,"
                )
            tensors[name] = GgufTensor(self.raw, kind, shape, data_start + offset, nbytes)
            end = position + nbytes
            position = -(-end // alignment) * alignment
        if entries and self.raw.size < data_start + end:
            short = data_start + end - self.raw.size
            raise CheckpointError(
                f"{self.path} is {short} bytes short: {self.raw.size} bytes, its header says {data_start + end}; "
                "download it again"
            )
        if entries and self.raw.size > data_start + position:
            more = self.raw.size - data_start - position
            raise CheckpointError(f"{self.path} is {more} bytes longer than its header says; download it again")
        return tensors


def begins_as_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file by its first bytes. Raises CheckpointError where it cannot be read."""
    raw = RawFile(path)
    try:
        start = bytearray(min(raw.size, len(MAGIC)))
        raw.read_into(memoryview(start), 0)
        return bytes(start) == MAGIC
    finally:
        raw.close()
