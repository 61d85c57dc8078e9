"""Weights on disk: safetensors files, single or sharded, read tensor by tensor (or row range) with pread.

A `Checkpoint` knows names, shapes, dtypes and byte ranges; it never holds weights. Headers are parsed and checked here
rather than by the safetensors library for two reasons: rows can be read straight into a buffer that already is the
weight's home (pinned memory, a staging slot) without a copy in between, and an error can name the file and the number
of missing bytes. Nothing is memory-mapped: a file that is truncated while the model loads is then an error, not SIGBUS.

The header of a shard is the truth; `model.safetensors.index.json` only says which files there are. Pickle files (.bin,
.pt) are refused unopened.

Format: 8 bytes little-endian header length, JSON header, then the data of all tensors without gaps (safetensors
documentation, "Format").
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hetero_attn.config import ModelConfig, read_json
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.weights import model_spec

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_INDEX_BYTES = 64 << 20
_HEAD = "lm_head.weight"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_LFS_MAGIC = b"version https://git-lfs"
# Bits per element of every dtype the format has: sizes are checked even for dtypes that hetero_attn does not run.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
_BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_RUNNABLE = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model must have, name -> shape; weights are [out_features, in_features]. No head when tied."""
    spec = model_spec(config)
    expected = {spec.embed: (config.vocab_size, config.hidden_size), spec.final_norm: (config.hidden_size,)}
    for linear in spec.linears:
        for part in linear.parts:
            expected[part.tensor] = (part.rows, linear.in_features)
            if linear.has_bias:
                expected[part.bias] = (part.rows,)
    for layer in spec.layers:
        expected |= {name: (config.hidden_size,) for name in (layer.input_norm, layer.post_attention_norm)}
        expected |= {name: (config.head_dim,) for name in (layer.q_norm, layer.k_norm) if name}
    return expected


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: where its bytes are. `offset` counts from the start of the file."""

    shard: "_Shard"
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Shard:
    """One open safetensors file and what it was when opened (size in bytes, modification time)."""

    def __init__(self, path: Path):
        self.path = path
        # A FIFO or device behind the name would block or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file, expected a safetensors file")
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the file; CheckpointError if the file changed since it was opened."""
        done = 0
        while done < len(buffer):
            # Linux reads at most 2 GiB in one call.
            count = os.preadv(self.fd, [buffer[done : done + (1 << 30)]], offset + done)
            if count == 0:
                break
            done += count
        if done < len(buffer) or self._stamp() != self.stamp:
            raise CheckpointError(
                f"{self.path}: the file changed while it was being read (was {self.stamp[0]} bytes, is {self._stamp()[0]}); "
                "do not touch a checkpoint while it loads, then load it again"
            )


class Checkpoint:
    """The tensors of one model directory. Use `Checkpoint.open`; close it, or use it as a context manager.

    Reading is safe from several threads at once (pread has no file position).

    Attributes:
        path: the model directory.
        nbytes: bytes of all tensors.
        warnings: oddities found on opening that do not change the weights, in plain words.
    """

    def __init__(self, path: Path, shards: list[_Shard], entries: dict[str, _Entry], warnings: list[str]):
        self.path = path
        self.warnings = warnings
        self._shards = shards
        self._entries = entries

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open the safetensors files of a model directory and check every header.

        Args:
            path: local directory with `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

        Raises:
            CheckpointError: files missing, truncated, empty, not safetensors, contradicting each other, or only in
                another format.
        """
        path = Path(path)
        weight_map = _weight_map(path)
        shards: list[_Shard] = []
        try:
            entries: dict[str, _Entry] = {}
            for file_name in sorted(set(weight_map.values())) or [SINGLE_NAME]:
                shards.append(_Shard(path / file_name))
                _add_entries(entries, shards[-1])
            warnings = _compare_with_index(path, weight_map, entries)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(path, shards, entries, warnings)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in file order."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError when there is none of that name, as all methods here do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor: "fp32", "bf16" or "fp16"; any other keeps its safetensors name (such as "I32")."""
        return _RUNNABLE.get(self._entry(name).dtype, self._entry(name).dtype)

    def tensor_nbytes(self, name: str) -> int:
        """Bytes of one tensor on disk."""
        return self._entry(name).nbytes

    def read(self, name: str, rows: slice | None = None, out: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Read a tensor, or a range of its rows, from disk; no other byte is read.

        Args:
            name: tensor name. rows: range of the first dimension, step 1; None reads everything.
            out: contiguous CPU tensor (pinned or not) of the very dtype and shape, written in place; None allocates.

        Returns:
            `out`, or a new CPU tensor, in the dtype of the file.

        Raises:
            CheckpointError: no such tensor, a dtype that cannot be run, or a file changed since it was opened.
        """
        import torch

        entry = self._entry(name)
        if entry.dtype not in _TORCH_NAMES:
            raise CheckpointError(_bad_dtype(entry, name))
        start, stop, step = (rows or slice(None)).indices(entry.shape[0] if entry.shape else 1)
        assert step == 1, f"rows of {name} with step {step}, expected 1"
        shape = (max(stop - start, 0), *entry.shape[1:]) if entry.shape else ()
        dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
        out = torch.empty(shape, dtype=dtype) if out is None else out
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu", (
            f"out for {name} is {out.dtype} {tuple(out.shape)} on {out.device}, expected contiguous {dtype} {shape} on cpu"
        )
        row_bytes = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        entry.shard.read_into(buffer, entry.offset + start * row_bytes)
        return out

    def check(self, config: ModelConfig) -> list[str]:
        """Compare the tensors with what `config` asks for.

        Returns:
            Warnings in plain words: those of opening, and tensors that the model does not use.

        Raises:
            CheckpointError: tensors missing, of the wrong shape, of a dtype that cannot be run, or layers beyond
                `config.num_layers`.
        """
        expected = expected_tensors(config)
        self._check_missing(expected)
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        unexpected = [name for name in self._entries if name not in expected]
        if config.tie_word_embeddings and _HEAD in unexpected:
            unexpected.remove(_HEAD)
            self._check_tied(model_spec(config).embed)
        self._check_layers(unexpected, config.num_layers)
        if not unexpected:
            return list(self.warnings)
        return [*self.warnings, f"{self.path}: {len(unexpected)} tensors are not used by this model: {_some(unexpected)}"]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: no tensor {name} in the checkpoint ({len(self._entries)} tensors)")
        return self._entries[name]

    def _check_missing(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in expected if name not in self._entries]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors that config.json asks for are missing from the weight "
                f"files: {_some(missing)}. Download the checkpoint again, or correct config.json"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.shard.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)} from config.json; "
                "config and weights are of different models, download both again"
            )
        if entry.dtype not in _RUNNABLE:
            raise CheckpointError(_bad_dtype(entry, name))

    def _check_tied(self, embed: str) -> None:
        """A tied model may carry a copy of its embedding as the head, never other values: they would be ignored."""
        import torch

        num_rows = self.shape(embed)[0]
        ranges = (slice(row, row + 4096) for row in range(0, num_rows, 4096))
        same = self.shape(_HEAD) == self.shape(embed) and self.dtype(_HEAD) == self.dtype(embed)
        if not same or not all(torch.equal(self.read(embed, rows), self.read(_HEAD, rows)) for rows in ranges):
            raise CheckpointError(
                f"{self.path}: tie_word_embeddings is true in config.json, but {_HEAD} and {embed} have different values; set "
                "tie_word_embeddings to false to use both"
            )

    def _check_layers(self, unexpected: list[str], num_layers: int) -> None:
        prefix = "model.layers."
        layers = {name.removeprefix(prefix).split(".")[0] for name in unexpected if name.startswith(prefix)}
        extra = sorted(int(layer) for layer in layers if layer.isdecimal() and int(layer) >= num_layers)
        if extra:
            raise CheckpointError(
                f"{self.path}: the weight files have layers up to {extra[-1]}, but num_hidden_layers in config.json is "
                f"{num_layers}; layers {_some([str(layer) for layer in extra])} would be dropped. Correct config.json"
            )

    def close(self) -> None:
        """Close all files; reading afterwards is an error. May be called twice."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _some(names: list[str], limit: int = 10) -> str:
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _bad_dtype(entry: _Entry, name: str) -> str:
    return (
        f"{entry.shard.path}: tensor {name} has dtype {entry.dtype}, expected one of {', '.join(_RUNNABLE)}; "
        "use a checkpoint with fp32, fp16 or bf16 weights"
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty for a single file. All files named are there."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory; expected a model directory with {SINGLE_NAME}")
    if (path / SINGLE_NAME).exists():
        return {}
    if not (path / INDEX_NAME).exists():
        raise CheckpointError(_no_weights(path))
    try:
        weight_map = read_json(path / INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_NAME}: no weight_map object in it; download it again")
    for tensor, file_name in weight_map.items():
        # Base names only: an index from the internet must not reach files outside the model directory.
        good = isinstance(file_name, str) and file_name.endswith(".safetensors") and not set(file_name) & set("/\\\0")
        if not good:
            raise CheckpointError(
                f"{path / INDEX_NAME}: tensor {tensor} is mapped to {str(file_name)[:200]!r}, expected the bare name of a "
                ".safetensors file in the same directory; do not use this checkpoint"
            )
    missing = [name for name in sorted(set(weight_map.values())) if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(set(weight_map.values()))} weight files that {INDEX_NAME} names are missing: "
            f"{_some(missing, 1000)}. Download them again"
        )
    return weight_map


def _no_weights(path: Path) -> str:
    """Why there is nothing to load, and what to do about what is there instead."""
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    expected = f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} found"
    if pickles := [name for name in files if Path(name).suffix in _PICKLE_SUFFIXES]:
        return (
            f"{expected}, only {_some(pickles)}; pickle files can run code when opened, so hetero_attn never opens them. If "
            "you trust this one, convert it once: python -c \"from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path.name}-safetensors')\" and copy the tokenizer "
            "files beside it"
        )
    if shards := [name for name in files if name.endswith((".safetensors", ".gguf"))]:
        return f"{expected}, only {_some(shards)}; download the whole checkpoint in Hugging Face format again"
    return f"{expected}; the directory holds {_some(files) or 'no files'}. Check the path or download the model again"


def _add_entries(entries: dict[str, _Entry], shard: _Shard) -> None:
    for name, entry in _read_header(shard):
        if name in entries:
            raise CheckpointError(
                f"{shard.path}: tensor {name} is also in {entries[name].shard.path.name}; each tensor must be in one file only. "
                "Download the checkpoint again"
            )
        entries[name] = entry


def _read_header(shard: _Shard) -> Iterator[tuple[str, _Entry]]:
    """Tensors of a file in data order; every byte of the file is accounted for, or CheckpointError."""
    size = shard.stamp[0]
    header, data_start = _header_json(shard, size)
    items = [(name, *_header_entry(shard, name, value)) for name, value in header.items() if name != "__metadata__"]
    position = 0
    for name, dtype, shape, begin, end in sorted(items, key=lambda item: item[3:]):
        if begin != position:
            raise CheckpointError(
                f"{shard.path}: tensor {name} starts at data byte {begin}, expected {position}: tensors overlap or leave a "
                "gap. Download the file again"
            )
        yield name, _Entry(shard, dtype, shape, data_start + begin, end - begin)
        position = end
    need = data_start + position
    if size != need:
        problem = f"{need - size} bytes short" if size < need else f"{size - need} bytes too long"
        raise CheckpointError(
            f"{shard.path} is {problem} ({size} bytes, its header says {need}); download it again"
        )


def _header_json(shard: _Shard, size: int) -> tuple[dict[str, Any], int]:
    """(parsed header, file offset of the data)."""
    start = bytearray(min(size, 64))
    shard.read_into(memoryview(start), 0)
    if start.startswith(_LFS_MAGIC):
        raise CheckpointError(f"{shard.path}: this is a Git LFS pointer, not the weights; run `git lfs pull` in that directory")
    if size < 8:
        found = f"the file has {size} bytes" if size else "the file is empty"
        raise CheckpointError(f"{shard.path}: {found}, expected a safetensors file; download it again")
    length = int.from_bytes(start[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{shard.path}: header of {length} bytes in a file of {size} bytes (at most {MAX_HEADER_BYTES} are allowed); the "
            "file is truncated or no safetensors file, download it again"
        )
    raw = bytearray(length)
    shard.read_into(memoryview(raw), 8)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shard.path}: damaged safetensors header: {error}; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{shard.path}: the safetensors header is no JSON object; download it again")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the same key stands twice")
    return values


def _header_entry(shard: _Shard, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, checked against each other."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        integers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        good = integers and begin <= end and math.prod(shape) * _BITS[dtype] == (end - begin) * 8
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{shard.path}: header entry of tensor {name[:200]!r} is {str(value)[:200]}, expected a known dtype, a shape and "
            "offsets of just that size; download the file again"
        )
    return dtype, shape, begin, end


def _compare_with_index(path: Path, weight_map: dict[str, str], entries: dict[str, _Entry]) -> list[str]:
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise CheckpointError(
            f"{path / INDEX_NAME}: names {len(absent)} tensors that no weight file holds: {_some(absent)}. Download the "
            "checkpoint again"
        )
    moved = [name for name, file_name in weight_map.items() if entries[name].shard.path.name != file_name]
    if not moved:
        return []
    return [f"{path / INDEX_NAME}: {len(moved)} tensors are in another file than the index says: {_some(moved)}"]
