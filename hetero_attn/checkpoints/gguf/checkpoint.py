"""The weights of a model in GGUF files, under our names, read by row range; the counterpart of `Checkpoint`."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hetero_attn.checkpoints.gguf.config import gguf_config, gguf_terms
from hetero_attn.checkpoints.gguf.expert_tensors import by_our_names
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.file import GgufFile, GgufTensor
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.gguf.names import LONG_DIVISORS, ROPE_DIVISORS, SHORT_DIVISORS, split_block
from hetero_attn.checkpoints.gguf.parts import open_parts
from hetero_attn.checkpoints.gguf.value_heads import in_our_order
from hetero_attn.checkpoints.raw_file import Extent
from hetero_attn.checkpoints.row_order import in_turn, is_rotated, pieces, runs_between, turn_back
from hetero_attn.errors import CheckpointError, UnsupportedModelError
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import tensor_name

if TYPE_CHECKING:
    import torch

_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ROPE_TENSORS = (ROPE_DIVISORS, LONG_DIVISORS, SHORT_DIVISORS)
_INSTEAD_BITS = 4.5  # of Q4_K, which is offered where a type is refused


class GgufCheckpoint:
    """The tensors of one model in GGUF files. Made by `GgufCheckpoint.open`; close it, or use it as a context manager.

    Reading is safe from several threads at once. Rows of q and k that the file keeps in another order come in ours.

    Attributes:
        path: the file with the metadata. warnings: oddities met on opening; none are known of GGUF.
    """

    def __init__(self, path: Path, files: list[GgufFile], tensors: dict[str, GgufTensor]):
        self.path = path
        self.warnings: list[str] = []
        self._files = files
        self._theirs = tensors
        self.fields = GgufFields(path, files[0].metadata)
        self._terms = gguf_terms(self.fields)
        self._ours = {name: self._held_by(name, tensor) for name, tensor in tensors.items()}
        self._entries = {ours: tensor for found in self._ours.values() for ours, tensor in found.items()}

    def _held_by(self, name: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
        """The tensors of ours that one of the file holds: one, several, or none where no model of ours has it."""
        layer, part, kind = split_block(name)
        if grouped := dict(self._terms.grouped).get(part):
            return self._grouped(name, tensor, grouped)
        if fused := dict(self._terms.fused).get(part):
            found = pieces(self.path, name, tensor, fused, self.config)
            return self._ordered({tensor_name(word, layer, kind): piece for word, piece in found})
        if word := dict(self._terms.parts).get(part):
            return self._ordered({tensor_name(word, layer, kind): tensor})
        return self._ordered(by_our_names(name, tensor))

    def _grouped(self, name: str, tensor: GgufTensor, parts: tuple[str, ...]) -> dict[str, GgufTensor]:
        """The tensors of ours in one whose rows come in turn; a layer may have one of that name for a single part."""
        layer, _, kind = split_block(name)
        runs = in_turn(self.path, name, tensor.shape[0] if tensor.shape else 0, parts, self.config)
        row_bytes = tensor.nbytes // tensor.shape[0]
        return {
            tensor_name(word, layer, kind): replace(
                tensor, shape=(rows, *tensor.shape[1:]), nbytes=rows * row_bytes, runs=own
            )
            for word, own in runs.items()
            for rows in [sum(count for _, count in own)]
        }

    def _ordered(self, found: dict[str, GgufTensor]) -> dict[str, GgufTensor]:
        """Tensors with the rows of value heads in our order, of files that have them in another."""
        if not self._terms.has_tiled_values or self.config.delta is None:
            return found
        return {name: in_our_order(name, tensor, self.config.delta) for name, tensor in found.items()}

    @classmethod
    def open(cls, path: str | Path, known: KnownHeaders | None = None) -> "GgufCheckpoint":
        """Open a model by any of its files and check every header; no weight is read. known: as for `GgufFile`.

        Raises:
            CheckpointError: a file is damaged or missing, or the parts contradict each other.
        """
        files, tensors = open_parts(Path(path), known)
        try:
            return cls(files[0].path, files, tensors)
        except BaseException:
            for file in files:
                file.close()
            raise

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration; raises as `gguf_config` does."""
        divisors = {
            name: tuple(self._read(name, self._theirs[name]).float().tolist())
            for name in _ROPE_TENSORS
            if name in self._theirs
        }
        return gguf_config(self.fields, self._theirs, divisors)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in file order."""
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError when there is none of that name, as all methods here do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The format that holds a tensor exactly: "fp32", "bf16", "fp16", or a coded one such as "q4_k"."""
        return self._entry(name).type.format

    def source_type(self, name: str) -> str | None:
        """The file's type of a tensor of codes, as `CpuKernels.repack` wants it; None for plain numbers."""
        kind = self._entry(name).type
        return None if kind.items == 1 else kind.name

    def is_coded(self, name: str) -> bool:
        """Whether the file has codes for a tensor."""
        return self.source_type(name) is not None

    def input_order(self, name: str) -> "torch.Tensor | None":
        """None: inputs of every tensor are the model's."""
        return None

    def row_bytes(self, name: str) -> int:
        """Bytes of one row in the file."""
        return self._entry(name).row_bytes

    def torch_dtype(self, name: str) -> "torch.dtype":
        """The dtype that `read` returns: that of plain numbers, and uint8 for codes."""
        import torch

        return getattr(torch, _TORCH_DTYPES.get(self._entry(name).type.name, "uint8"))

    def read(self, name: str, rows: slice | None = None, out: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Read a tensor, or a range of its rows, from disk; no other byte is read.

        Args:
            name: tensor name. rows: range of the first dimension, step 1; None reads all. Of q and k whole heads.
            out: contiguous CPU tensor of `torch_dtype` and shape, of codes [rows, row_bytes]; None allocates.

        Raises:
            CheckpointError: no such tensor, or a file that changed since it was opened.
        """
        entry = self._entry(name)
        first, stop, _ = (rows or slice(None)).indices(entry.shape[0])
        out = self._read(name, entry, first, max(first, stop), out)
        if is_rotated(name) and self._terms.is_turned:
            turn_back(out, self.config.head_dim, self.config.rope.rotary_dim)
        return out

    def extent(self, name: str, start: int, stop: int) -> Extent | None:
        """As `WeightSource.extent`."""
        entry = self._entry(name)
        if is_rotated(name) and self._terms.is_turned:
            return None
        pieces = list(runs_between(entry.runs or ((0, entry.shape[0]),), start, stop))
        if len(pieces) != 1:
            return None
        row_bytes = entry.nbytes // entry.shape[0]
        return Extent(entry.file, entry.offset + pieces[0][0] * row_bytes, (stop - start) * row_bytes)

    def check(self, model: ModelSpec) -> list[str]:
        """Compare the tensors with those that the model's blocks declare; returns warnings in plain words.

        Raises:
            CheckpointError: tensors missing, of the wrong shape, or such as the model would ignore.
            UnsupportedModelError: tensors of a type that is not run.
        """
        expected = model.tensors
        if missing := [name for name in expected if name not in self]:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are missing, the first is {missing[0]}")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {list(self.shape(name))}, the metadata says {list(shape)}"
                )
        known, count = set(expected), len(model.layers)
        spare = range(count, count + model.spare_layers)
        unknown = [name for name, ours in self._ours.items() if not known & set(ours) and name not in _ROPE_TENSORS]
        if unused := [name for name in unknown if split_block(name)[0] not in spare]:
            raise UnsupportedModelError(
                f"{self.path}: {len(unused)} tensors would be ignored, the first is {unused[0]}: the architecture "
                f"{self.fields.architecture} does not have them here, and its answers would not be the model's"
            )
        self._check_types()
        return list(self.warnings)

    def close(self) -> None:
        """Close all files; reading afterwards is an error. May be called twice."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "GgufCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_types(self) -> None:
        refused = {name: entry for name, entry in self._entries.items() if not entry.type.format}
        if refused:
            kinds = sorted({entry.type.name for entry in refused.values()})
            items = sum(entry.nbytes // entry.type.block_bytes * entry.type.items for entry in refused.values())
            raise UnsupportedModelError(
                f"{self.path}: {len(refused)} tensors are of type {', '.join(kinds)}, which is not run (the first is "
                f"{next(iter(refused))}); take the model as IQ4_XS or Q4_K_M, where they are about "
                f"{items * _INSTEAD_BITS / 8 / 2**30:.2f} GiB"
            )

    def _entry(self, name: str) -> GgufTensor:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: no tensor {name} among the {len(self._entries)} of the model")
        return self._entries[name]

    def _read(
        self, name: str, entry: GgufTensor, first: int = 0, stop: int | None = None, out: "torch.Tensor | None" = None
    ) -> "torch.Tensor":
        import torch

        rows = (entry.shape[0] if stop is None else stop) - first
        plain = _TORCH_DTYPES.get(entry.type.name)
        shape = (rows, *entry.shape[1:]) if plain else (rows, entry.row_bytes)
        dtype = getattr(torch, plain or "uint8")
        out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous(), (name, out.shape, out.dtype, shape)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        row_bytes = entry.nbytes // entry.shape[0]
        for at, count, to in runs_between(entry.runs or ((0, entry.shape[0]),), first, first + rows):
            entry.file.read_weights(buffer[to * row_bytes : (to + count) * row_bytes], entry.offset + at * row_bytes)
        return out
