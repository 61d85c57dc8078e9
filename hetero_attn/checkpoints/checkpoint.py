"""The weights of a model on disk: safetensors, single or sharded, read tensor by tensor or by row range.

A `Checkpoint` knows names, shapes, dtypes and byte ranges; it never holds weights. The headers of the weight files are
the truth; `model.safetensors.index.json` only says which files there are. Pickle files (.bin, .pt) are never opened.
"""

from array import array
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hetero_attn.checkpoints.expert_entries import by_our_names
from hetero_attn.checkpoints.files import open_files, some
from hetero_attn.checkpoints.raw_file import Extent
from hetero_attn.checkpoints.row_order import groups, is_rotated, pieces, turn_back
from hetero_attn.checkpoints.safetensors import ColumnsEntry, GroupsEntry, SafetensorsFile, TensorEntry
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import AS_OURS, LAYER_PREFIX, TensorNames, split_name, tensor_name

if TYPE_CHECKING:
    import torch

_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_INTEGERS = {"I64": "q", "I32": "i"}
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_COMPARED_ROWS = 4096  # rows of a vocabulary matrix compared at a time: tens of MB


class Checkpoint:
    """The tensors of one model directory. Made by `Checkpoint.open`; close it, or use it as a context manager.

    Reading is safe from several threads at once.

    Attributes:
        path: the model directory.
        warnings: oddities met on opening that do not change the weights, in plain words.
    """

    def __init__(
        self,
        path: Path,
        files: list[SafetensorsFile],
        warnings: list[str],
        tensor_names: TensorNames = AS_OURS,
        config: ModelConfig | None = None,
    ):
        self.path = path
        self.warnings = warnings
        self._files = files
        entries = {name: entry for file in files for name, entry in file.entries.items()}
        self._entries = by_our_names(
            {tensor_names.ours(name): entry for name, entry in self._full_names(entries).items()},
            tensor_names.has_turned_experts,
        )
        self._config, self._is_turned = config, tensor_names.is_turned
        self._cut_groups(dict(tensor_names.grouped))
        self._cut(dict(tensor_names.fused))

    @classmethod
    def open(
        cls, path: str | Path, tensor_names: TensorNames = AS_OURS, config: ModelConfig | None = None
    ) -> "Checkpoint":
        """Open the safetensors files of a model directory and check every header; no weight is read.

        Args:
            path: local directory with `model.safetensors`, or `model.safetensors.index.json` and the files it names.
            tensor_names: what the family calls its tensors; here they go by our names. config: of the model, where a
                tensor of the files holds several of ours, or rows in another order.

        Raises:
            CheckpointError: files are missing, truncated, empty, not safetensors, contradict each other, or are there
                only in another format.
        """
        path = Path(path)
        files, warnings = open_files(path)
        try:
            return cls(path, files, warnings, tensor_names, config)
        except BaseException:
            for file in files:
                file.close()
            raise

    def _cut_groups(self, grouped: dict[str, tuple[str, ...]]) -> None:
        """The same of tensors whose parts come in turn."""
        for name in [name for name in self._entries if split_name(name)[1] in grouped]:
            layer, part, kind = split_name(name)
            assert self._config is not None, f"{name} is cut by the sizes of a config, which is not given"
            for word, piece in groups(self.path, name, self._entries.pop(name), grouped[part], self._config):
                self._entries[tensor_name(word, layer, kind)] = piece

    def _cut(self, fused: dict[str, tuple[str, ...]]) -> None:
        """Put the parts of tensors that hold several of ours in their places."""
        for name in [name for name in self._entries if split_name(name)[1] in fused]:
            layer, part, kind = split_name(name)
            assert self._config is not None, f"{name} is cut by the sizes of a config, which is not given"
            for word, piece in pieces(self.path, name, self._entries.pop(name), fused[part], self._config):
                self._entries[tensor_name(word, layer, kind)] = piece

    @staticmethod
    def _full_names(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Entries by the names of a whole model: dumps of the part below the head leave their common prefix out."""
        embed, head = tensor_name("embed"), tensor_name("head")
        prefix = embed.partition(".")[0] + "."
        if embed in entries or embed.removeprefix(prefix) not in entries:
            return entries
        return {name if name == head else prefix + name: entry for name, entry in entries.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in file order."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        columns = (entry for entry in self._entries.values() if isinstance(entry, ColumnsEntry))
        twice = sum(entry.nbytes - entry.nbytes // entry.step for entry in columns)
        return sum(entry.nbytes for entry in self._entries.values()) - twice

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises CheckpointError when there is none of that name, as all methods here do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor: "fp32", "bf16" or "fp16"; any other keeps its safetensors name (such as "I32")."""
        return _DTYPES.get(self._entry(name).dtype, self._entry(name).dtype)

    def source_type(self, name: str) -> str | None:
        """None: every tensor is plain numbers."""
        return None

    def is_coded(self, name: str) -> bool:
        """Whether the file has codes for a tensor."""
        return False

    def input_order(self, name: str) -> "torch.Tensor | None":
        """None: inputs of every tensor are the model's."""
        return None

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor in the file."""
        entry = self._entry(name)
        return entry.nbytes // max(entry.columns if isinstance(entry, ColumnsEntry) else entry.shape[0], 1)

    def torch_dtype(self, name: str) -> "torch.dtype":
        """The dtype that `read` returns for tensor `name`; CheckpointError where it is one that cannot be run."""
        import torch

        entry = self._entry(name)
        _check_dtype(entry, name)
        return getattr(torch, _TORCH_DTYPES[entry.dtype])

    def read(self, name: str, rows: slice | None = None, out: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Read a tensor, or a range of its rows, from disk; no other byte is read, except of what lies in columns.

        Args:
            name: tensor name. rows: range of the first dimension, step 1; None reads everything. Of
                q and k that lie as pairs, whole heads.
            out: contiguous CPU tensor (pinned or not) of the very dtype and shape, written in place; None allocates.

        Returns:
            `out`, or a new CPU tensor, in the dtype of the file.

        Raises:
            CheckpointError: no such tensor, a dtype that cannot be run, or a file that changed since it was opened.
        """
        import torch

        entry, dtype = self._entry(name), self.torch_dtype(name)
        start, stop, step = (rows or slice(None)).indices(entry.shape[0] if entry.shape else 1)
        assert step == 1, f"rows of {name} with step {step}, expected 1"
        shape = (max(stop - start, 0), *entry.shape[1:]) if entry.shape else ()
        out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu", (
            f"out for {name} is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {shape} on cpu"
        )
        if isinstance(entry, ColumnsEntry):
            out.copy_(entry.values(dtype)[start:stop])
            return out
        row_bytes = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        if isinstance(entry, GroupsEntry):
            entry.read_rows(start, stop, buffer)
            return out
        entry.file.read_weights(buffer, entry.offset + start * row_bytes)
        self._turn(name, out)
        return out

    def extent(self, name: str, start: int, stop: int) -> Extent | None:
        """As `WeightSource.extent`."""
        entry = self._entry(name)
        if type(entry) is not TensorEntry or (self._is_turned and is_rotated(name)):
            return None
        row_bytes = entry.nbytes // entry.shape[0]
        return Extent(entry.file, entry.offset + start * row_bytes, (stop - start) * row_bytes)

    def read_integers(self, name: str) -> list[int]:
        """A tensor of whole numbers of 32 or 64 bits, such as a table of token ids; CheckpointError for others."""
        entry = self._entry(name)
        if entry.dtype not in _INTEGERS:
            raise CheckpointError(f"{entry.file.path}: tensor {name} has dtype {entry.dtype}, expected I64 or I32")
        values = array(_INTEGERS[entry.dtype], bytes(entry.nbytes))
        entry.file.read_into(memoryview(values).cast("B"), entry.offset)
        return values.tolist()

    def _turn(self, name: str, rows: "torch.Tensor") -> None:
        """Bring rows of whole heads that lie as pairs into our order, in place; leave those of other tensors."""
        if self._is_turned and is_rotated(name):
            assert self._config is not None, f"rows of {name} are turned by the sizes of a config, which is not given"
            turn_back(rows, self._config.head_dim, self._config.rope.rotary_dim)

    def check(self, model: ModelSpec) -> list[str]:
        """Compare the tensors with those that the model's blocks declare.

        Returns:
            Warnings in plain words: those of opening, and tensors that the model does not use.

        Raises:
            CheckpointError: tensors missing, of the wrong shape, of a dtype that cannot be run, layers beyond
                the model's, or a head that a tied model would ignore.
        """
        expected = model.tensors
        if missing := [name for name in expected if name not in self]:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors that config.json asks for are missing from "
                f"the weight files: {some(missing)}. Download the checkpoint again, or correct config.json"
            )
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        unexpected = [name for name in self.names if name not in expected and name not in model.spare_tensors]
        if model.is_tied and tensor_name("head") in unexpected:
            unexpected.remove(tensor_name("head"))
            self._check_tied(tensor_name("embed"), tensor_name("head"))
        self._check_layers(unexpected, len(model.layers), model.spare_layers)
        if not unexpected:
            return list(self.warnings)
        unused = f"{self.path}: {len(unexpected)} tensors are not used by this model: {some(unexpected)}"
        return [*self.warnings, unused]

    def close(self) -> None:
        """Close all files; reading afterwards is an error. May be called twice."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: no tensor {name} among the {len(self._entries)} of the checkpoint")
        return self._entries[name]

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)} from "
                "config.json; config and weights are of different models, download both again"
            )
        _check_dtype(entry, name)

    def _check_tied(self, embed: str, head: str) -> None:
        """A tied model may carry a copy of its embedding as the head, never other values: they would be ignored."""
        import torch

        num_rows = self.shape(embed)[0]
        ranges = (slice(row, row + _COMPARED_ROWS) for row in range(0, num_rows, _COMPARED_ROWS))
        same_form = self.shape(head) == self.shape(embed) and self.dtype(head) == self.dtype(embed)
        if not same_form or not all(torch.equal(self.read(embed, rows), self.read(head, rows)) for rows in ranges):
            raise CheckpointError(
                f"{self.path}: tie_word_embeddings is true in config.json, but {head} and {embed} hold different "
                "values; set tie_word_embeddings to false to use both"
            )

    def _check_layers(self, unexpected: list[str], num_layers: int, spare_layers: int) -> None:
        layers = {name.removeprefix(LAYER_PREFIX).split(".")[0] for name in unexpected if name.startswith(LAYER_PREFIX)}
        extra = sorted(int(layer) for layer in layers if layer.isdecimal() and int(layer) >= num_layers + spare_layers)
        if extra:
            raise CheckpointError(
                f"{self.path}: the weight files have layers up to {extra[-1]}, but num_hidden_layers in config.json is "
                f"{num_layers}, so {len(extra)} layers would be dropped; correct config.json or download both again"
            )


def _check_dtype(entry: TensorEntry, name: str) -> None:
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{entry.file.path}: tensor {name} has dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}; use a "
            "checkpoint with fp32, fp16 or bf16 weights"
        )
