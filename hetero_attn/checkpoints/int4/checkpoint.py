"""A model directory whose linears are int4 groups: its plain tensors as `Checkpoint` has them, the others as codes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from cpu_kernels.formats import INT4_TYPES
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import some
from hetero_attn.checkpoints.int4.module import (
    CODES,
    GROUP_OF_INPUT,
    PARTS,
    Module,
    ModuleTensors,
    check_group_order,
    find_module,
    read_module,
    row_blocks,
)
from hetero_attn.checkpoints.int4.scheme import Int4Scheme, read_scheme
from hetero_attn.checkpoints.safetensors import SafetensorsFile
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.tensor_names import AS_OURS, TensorNames

if TYPE_CHECKING:
    import torch

KEPT_MODULES = 3  # whose tensors stay in memory: q, k and v are read in turns
_RAW_DTYPES = {"I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16"}


class Int4Checkpoint(Checkpoint):
    """The tensors of a GPTQ, AWQ or compressed-tensors model; made by `Int4Checkpoint.open`, read as a `Checkpoint`.

    A quantised linear is one tensor of codes, `NAME.weight`. Codes lie across rows in two of the layouts, so a module
    is read whole when its first rows are asked for, and kept until KEPT_MODULES others were.
    """

    def __init__(
        self, path: Path, files: list[SafetensorsFile], warnings: list[str], tensor_names: TensorNames = AS_OURS
    ):
        super().__init__(path, files, warnings, tensor_names)
        scheme = read_scheme(path)
        if scheme is None:
            raise CheckpointError(f"{path}: config.json has no quantization_config; its weights are not quantised")
        self._scheme: Int4Scheme = scheme
        self._modules = self._find_modules()
        self._read: OrderedDict[str, ModuleTensors] = OrderedDict()
        self._lock = Lock()

    def _find_modules(self) -> dict[str, Module]:
        """Modules by the name of their weight; their parts are no tensors of their own from here on."""
        parts = PARTS[self._scheme.method]
        shapes = {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}
        suffixes = {part for part in parts if part}
        prefixes = dict.fromkeys(name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in suffixes)
        found = {f"{prefix}.weight": find_module(prefix, self._scheme, shapes, str(self.path)) for prefix in prefixes}
        if not found:
            raise CheckpointError(
                f"{self.path}: config.json says {self._scheme.method}, but no tensor is called {parts[CODES]}; "
                "config and weights are of different models, download both again"
            )
        if both := [name for name in found if name in shapes]:
            raise CheckpointError(f"{self.path}: {both[0]} is there both quantised and plain; download the model again")
        self._parts = {name: self._entries.pop(name) for module in found.values() for name in module.parts if name}
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, those of quantised linears last."""
        return (*self._entries, *self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._modules

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; as everywhere here, of a quantised linear that of its values."""
        module = self._modules.get(name)
        return super().shape(name) if module is None else (module.out_features, module.in_features)

    def dtype(self, name: str) -> str:
        """The format that holds a tensor exactly."""
        module = self._modules.get(name)
        return super().dtype(name) if module is None else INT4_TYPES[module.group].format

    def source_type(self, name: str) -> str | None:
        """The form of rows of codes, as `CpuKernels.repack` wants it; None for plain numbers."""
        module = self._modules.get(name)
        return None if module is None else INT4_TYPES[module.group].name

    def row_bytes(self, name: str) -> int:
        """Bytes of one row as `read` gives it."""
        module = self._modules.get(name)
        return super().row_bytes(name) if module is None else module.row_bytes

    def torch_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns; uint8 for codes."""
        import torch

        return super().torch_dtype(name) if name not in self._modules else torch.uint8

    def read(self, name: str, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor or a range of its rows; of a quantised linear blocks of groups, uint8 [rows, row_bytes].

        Raises:
            CheckpointError: no such tensor, or one that the file contradicts. UnsupportedModelError: scattered groups.
        """
        module = self._modules.get(name)
        if module is None:
            return super().read(name, rows, out)
        import torch

        first, stop, step = (rows or slice(None)).indices(module.out_features)
        assert step == 1, f"rows of {name} with step {step}, expected 1"
        shape = (max(stop - first, 0), module.row_bytes)
        out = torch.empty(shape, dtype=torch.uint8, device="cpu") if out is None else out
        assert out.shape == shape and out.dtype == torch.uint8 and out.is_contiguous(), (name, out.shape, shape)
        row_blocks(module, self._scheme, self._tensors(name, module), first, first + shape[0], out)
        return out

    def check(self, model: ModelSpec) -> list[str]:
        """As `Checkpoint.check`; the order of groups is looked at too, and a bias that would be ignored must be zero.

        Raises:
            CheckpointError: as there. UnsupportedModelError: scattered groups.
        """
        for module in self._modules.values():
            if name := module.parts[GROUP_OF_INPUT]:
                check_group_order(module, self._raw(name), str(self.path))
        warnings, known = super().check(model), model.tensors
        biases = [f"{module.prefix}.bias" for module in self._modules.values()]
        ignored = [name for name in biases if name in self._entries and name not in known]
        if wrong := [name for name in ignored if bool(self.read(name).any())]:
            raise CheckpointError(
                f"{self.path}: {some(wrong)} would be ignored and is not zero; the model is not of the architecture "
                "that config.json says"
            )
        return [] if len(ignored) == len([name for name in self.names if name not in known]) else warnings

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._modules:
            super()._check_tensor(name, shape)
        elif self.shape(name) != shape:
            raise CheckpointError(
                f"{self.path}: {name} is {list(self.shape(name))} by its codes, expected {list(shape)} from config.json"
            )

    def _tensors(self, name: str, module: Module) -> ModuleTensors:
        with self._lock:
            if name not in self._read:
                self._read[name] = read_module(module, self._scheme, self._raw, str(self.path))
                while len(self._read) > KEPT_MODULES:
                    self._read.popitem(last=False)
            return self._read[name]

    def _raw(self, name: str) -> torch.Tensor:
        """A part of a module as it is in the file."""
        import torch

        entry = self._parts[name]
        values = torch.empty(entry.shape, dtype=getattr(torch, _RAW_DTYPES[entry.dtype]), device="cpu")
        entry.file.read_into(memoryview(values.reshape(-1).view(torch.uint8).numpy()), entry.offset)
        return values
