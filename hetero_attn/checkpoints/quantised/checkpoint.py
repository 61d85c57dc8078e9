"""A model directory whose linears are quantised: its plain tensors as `Checkpoint` has them, the others as codes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import some
from hetero_attn.checkpoints.quantised.find import find_modules
from hetero_attn.checkpoints.quantised.module import Module, RowWriter
from hetero_attn.checkpoints.quantised.order import SCATTERED_APART, apart
from hetero_attn.checkpoints.quantised.scheme import read_scheme
from hetero_attn.checkpoints.raw_file import Extent
from hetero_attn.checkpoints.row_order import Runs, in_turn, rows_of, runs_between
from hetero_attn.checkpoints.safetensors import SafetensorsFile
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.blocks import ModelSpec
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import AS_OURS, TensorNames, split_name, tensor_name

if TYPE_CHECKING:
    import torch

KEPT_MODULES = 3  # whose tensors stay in memory: q, k and v are read in turns
_RAW_DTYPES = {
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "uint8",  # exponents
}


class Piece(NamedTuple):
    """Rows of a module, which are one linear of ours; runs: of which the rows are made, in order."""

    module: Module
    runs: Runs

    @property
    def rows(self) -> int:
        """How many they are."""
        return sum(count for _, count in self.runs)


class QuantisedCheckpoint(Checkpoint):
    """The tensors of a quantised model; made by `QuantisedCheckpoint.open`, read as a `Checkpoint`.

    A quantised linear is one tensor, `NAME.weight`, of codes, or of float32 values where no format holds its codes. In
    some layouts codes lie across rows, so a module is read whole when its first rows are asked for, and kept until
    KEPT_MODULES others were.
    """

    def __init__(
        self,
        path: Path,
        files: list[SafetensorsFile],
        warnings: list[str],
        tensor_names: TensorNames = AS_OURS,
        config: ModelConfig | None = None,
    ):
        super().__init__(path, files, warnings, tensor_names, config)
        scheme = read_scheme(path)
        if scheme is None:
            raise CheckpointError(f"{path}: config.json has no quantization_config; its weights are not quantised")
        self._parts = dict(self._entries)  # also of modules, by the names that they have in the file
        shapes = {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}
        modules = find_modules(scheme, shapes, self._raw, str(path))
        for module in modules.values():
            for name in module.names:
                self._entries.pop(name)
        fused, grouped = dict(tensor_names.fused), dict(tensor_names.grouped)
        super()._cut_groups(grouped)
        super()._cut(fused)
        self._modules = {name: piece for each in modules.values() for name, piece in self._pieces(each, fused, grouped)}
        self._read: OrderedDict[str, RowWriter] = OrderedDict()
        self._lock = Lock()

    def _cut(self, fused: dict[str, tuple[str, ...]]) -> None:
        """Nothing yet: which tensors are codes, and which hold several of ours, is not known."""

    def _cut_groups(self, grouped: dict[str, tuple[str, ...]]) -> None:
        """Nothing yet, likewise."""

    def _pieces(
        self, module: Module, fused: dict[str, tuple[str, ...]], grouped: dict[str, tuple[str, ...]]
    ) -> Iterator[tuple[str, Piece]]:
        """(our name, its rows) of what a module holds: one linear, or several, one below the other or in turn."""
        if module.prefix.endswith(".gate_up_proj"):  # of an expert
            for index, name in enumerate(("gate_proj", "up_proj")):
                half = module.out_features // 2
                piece = Piece(module, ((index * half, half),))
                yield f"{module.prefix.removesuffix('gate_up_proj')}{name}.weight", piece
            return
        layer, part, _ = split_name(f"{module.prefix}.weight")
        if part not in fused and part not in grouped:
            yield f"{module.prefix}.weight", Piece(module, ((0, module.out_features),))
            return
        assert self._config is not None, f"{module.prefix} is cut by the sizes of a config, which is not given"
        if part in grouped:
            runs = in_turn(self.path, module.prefix, module.out_features, grouped[part], self._config)
            for word, own in runs.items():
                yield tensor_name(word, layer), Piece(module, own)
            return
        rows = rows_of(self.path, module.prefix, module.out_features, fused[part], self._config)
        for word, run in zip(fused[part], rows, strict=True):
            yield tensor_name(word, layer), Piece(module, (run,))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, those of quantised linears last."""
        return (*self._entries, *self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._modules

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; as everywhere here, of a quantised linear that of its values."""
        piece = self._modules.get(name)
        return super().shape(name) if piece is None else (piece.rows, piece.module.in_features)

    def dtype(self, name: str) -> str:
        """The format that holds a tensor exactly."""
        module = self._module(name)
        if module is None:
            return super().dtype(name)
        return "fp32" if module.kind is None else module.kind.format

    def source_type(self, name: str) -> str | None:
        """The form of rows of codes, as `CpuKernels.repack` wants it; None for plain numbers."""
        module = self._module(name)
        return None if module is None or module.kind is None else module.kind.name

    def is_coded(self, name: str) -> bool:
        """Whether the file has codes for a tensor, also where no format holds them."""
        return self._module(name) is not None

    def input_order(self, name: str) -> torch.Tensor | None:
        """Which input of the model each input of a tensor's rows is, int64; None where they are the same."""
        module = self._module(name)
        return None if module is None else module.input_order(self._raw)

    def row_bytes(self, name: str) -> int:
        """Bytes of one row as `read` gives it."""
        module = self._module(name)
        return super().row_bytes(name) if module is None else module.row_bytes

    def torch_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns; uint8 for codes."""
        import torch

        module = self._module(name)
        if module is None:
            return super().torch_dtype(name)
        return torch.float32 if module.kind is None else torch.uint8

    def read(self, name: str, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor or a range of its rows; of a quantised linear blocks of groups, uint8 [rows, row_bytes], or float32.
        Of q and k that lie as pairs, whole heads.

        Raises:
            CheckpointError: no such tensor, or one that the file contradicts. UnsupportedModelError: values that no
                format holds.
        """
        piece = self._modules.get(name)
        if piece is None:
            return super().read(name, rows, out)
        import torch

        module = piece.module
        first, stop, step = (rows or slice(None)).indices(piece.rows)
        assert step == 1, f"rows of {name} with step {step}, expected 1"
        dtype = self.torch_dtype(name)
        shape = (max(stop - first, 0), module.row_bytes // dtype.itemsize)
        out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous(), (name, out.shape, shape)
        write = self._rows(module)
        for at, count, to in runs_between(piece.runs, first, first + shape[0]):
            write(at, at + count, out[to : to + count])
        self._turn(name, out)
        return out

    def extent(self, name: str, start: int, stop: int) -> Extent | None:
        """As `Checkpoint.extent`; None of a quantised linear, whose codes are put together when they are read."""
        return None if name in self._modules else super().extent(name, start, stop)

    def check(self, model: ModelSpec) -> list[str]:
        """As `Checkpoint.check`; a bias that would be ignored must be zero, and linears without a format are named."""
        warnings, known = super().check(model), model.tensors
        biases = [name.removesuffix("weight") + "bias" for name in self._modules]
        ignored = [name for name in biases if name in self._entries and name not in known]
        if wrong := [name for name in ignored if bool(self.read(name).any())]:
            raise CheckpointError(
                f"{self.path}: {some(wrong)} would be ignored and is not zero; the model is not of the architecture "
                "that config.json says"
            )
        if len(ignored) == len([name for name in self.names if name not in known]):
            warnings = list(self.warnings)
        return [*warnings, *self._as_values(model)]

    def _as_values(self, model: ModelSpec) -> list[str]:
        """A warning where linears are held as float32."""
        held = {name: piece.module.why for name, piece in self._modules.items() if piece.module.kind is None}
        held |= dict.fromkeys(apart(self, model), SCATTERED_APART)
        if not held:
            return []
        return [
            f"{self.path}: {len(held)} quantised linears ({some(list(held))}) are held as float32, exactly but large, "
            f"for no format has {' or '.join(dict.fromkeys(held.values()))}; dtype q8 takes a quarter of it"
        ]

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._modules:
            super()._check_tensor(name, shape)
        elif self.shape(name) != shape:
            raise CheckpointError(
                f"{self.path}: {name} is {list(self.shape(name))} by its codes, expected {list(shape)} from config.json"
            )

    def _module(self, name: str) -> Module | None:
        """That of a linear by our name, None for a plain tensor."""
        piece = self._modules.get(name)
        return None if piece is None else piece.module

    def _rows(self, module: Module) -> RowWriter:
        with self._lock:
            if module.prefix not in self._read:
                self._read[module.prefix] = module.rows(self._raw, str(self.path))
                while len(self._read) > KEPT_MODULES:
                    self._read.popitem(last=False)
            return self._read[module.prefix]

    def _raw(self, name: str) -> torch.Tensor:
        """A tensor of the file as it is there."""
        import torch

        entry = self._parts[name]
        values = torch.empty(entry.shape, dtype=getattr(torch, _RAW_DTYPES[entry.dtype]), device="cpu")
        entry.file.read_weights(memoryview(values.reshape(-1).view(torch.uint8).numpy()), entry.offset)
        return values
