"""A model on disk, whatever kind of files it is in: opened, and asked for its configuration and its formats."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.files import has_any_weights, has_weight_files
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.choose import SUFFIX
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.quantised.checkpoint import QuantisedCheckpoint
from hetero_attn.checkpoints.quantised.declared import declared_formats
from hetero_attn.checkpoints.quantised.order import together
from hetero_attn.checkpoints.quantised.scheme import Scheme, read_scheme
from hetero_attn.checkpoints.raw_file import Extent
from hetero_attn.errors import CheckpointError
from hetero_attn.spec.config import ModelConfig, tensor_names
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats

if TYPE_CHECKING:
    import torch

PLAIN = ("fp32", "bf16", "fp16")


class WeightSource(Protocol):
    """Tensors by our names, read by row range; what `Checkpoint` and `GgufCheckpoint` have in common."""

    path: Path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> str:
        """The format that holds a tensor exactly."""

    def source_type(self, name: str) -> str | None:
        """The type of a tensor of codes; None for plain numbers."""

    def is_coded(self, name: str) -> bool:
        """Whether the file has codes for a tensor, also where `read` gives their numbers."""

    def input_order(self, name: str) -> "torch.Tensor | None":
        """Which input of the model each input of a tensor's rows is, int64; None where they are the same."""

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of codes in the file."""

    def torch_dtype(self, name: str) -> "torch.dtype":
        """The dtype that `read` returns; uint8 for codes."""

    def read(self, name: str, rows: slice | None = None, out: "torch.Tensor | None" = None) -> "torch.Tensor":
        """A tensor or a range of its rows."""

    def extent(self, name: str, start: int, stop: int) -> Extent | None:
        """Where the file has rows [start, stop) just as `read` gives them; None where it does not, or not in one
        piece."""


def is_gguf(path: Path) -> bool:
    """Whether a model's path is that of a GGUF file: every file is, other models are folders."""
    return path.is_file() or (path.suffix == SUFFIX and not path.is_dir())


def open_source(path: Path, known: KnownHeaders | None = None) -> Checkpoint | GgufCheckpoint:
    """Open a model directory with safetensors, or a GGUF file. known: GGUF headers that this start has read.

    Raises CheckpointError, and UnsupportedModelError for quantised weights that are not read.
    """
    if is_gguf(path):
        return GgufCheckpoint.open(path, known)
    names = tensor_names(path)
    kind = QuantisedCheckpoint if is_quantised(path) else Checkpoint
    needs_sizes = names.fused or names.grouped or names.is_turned
    return kind.open(path, names, ModelConfig.from_dir(path) if needs_sizes else None)


def is_quantised(path: Path) -> bool:
    """Whether the config of a model directory says how its weights are quantised; raises as `read_scheme` does."""
    return _scheme(path) is not None


def _scheme(path: Path) -> Scheme | None:
    return read_scheme(path) if (path / "config.json").exists() else None


def read_config(path: Path, known: KnownHeaders | None = None) -> ModelConfig:
    """The configuration of a model; no weight is read. Raises as `ModelConfig.from_dir` and `gguf_config` do.

    known: as for `open_source`.
    """
    if not is_gguf(path):
        return _with_embedding(path, ModelConfig.from_dir(path))
    with GgufCheckpoint.open(path, known) as source:
        return source.config


def _with_embedding(path: Path, config: ModelConfig) -> ModelConfig:
    """The config, of a head that drafts with what its files say: whether they have a token embedding."""
    if config.eagle is None:
        return config
    with open_source(path) as source:
        owns = tensor_name("embed") in source
    return replace(config, eagle=replace(config.eagle, owns_embedding=owns))


def expect_readable(path: Path, known: KnownHeaders | None = None) -> None:
    """Raise what opening raises for weight files that are there and damaged, or of a kind that is never opened; a
    config alone is enough to plan. known: as for `open_source`."""
    if is_gguf(path) or has_any_weights(path):
        open_source(path, known).close()


def stored_formats(path: Path, config: ModelConfig, known: KnownHeaders | None = None) -> WeightFormats:
    """The formats in which a model is held as it is on disk. known: as for `open_source`."""
    if not is_gguf(path):
        scheme = _scheme(path)
        if scheme is None:
            return _plain_formats(path, config)
        if not has_weight_files(path) and (declared := declared_formats(scheme, config)):
            return declared
    with open_source(path, known) as source:
        model = model_spec(config)
        source.check(model)
        routers = {tensor for block in model.blocks for matrix in block.matrices for tensor, _ in matrix.tensors}
        names = [name for name in source.names if len(source.shape(name)) > 1 and name not in routers]
        formats = {name: source.dtype(name) for name in names}
        embed = formats.get(tensor_name("embed"), "bf16")
        if is_gguf(path):
            return WeightFormats("bf16", embed, formats)
        reordered = {name: formats[name] for name in together(source, model)}
        apart = [name for name in formats if name not in reordered and source.input_order(name) is not None]
        return WeightFormats("bf16", embed, formats | dict.fromkeys(apart, "fp32"), reordered=reordered)


def _plain_formats(path: Path, config: ModelConfig) -> WeightFormats:
    """One dtype for all weights where the files have one, by their headers, else for each its own.

    The config may name another one than the files have: weights would then be rounded, or take twice the memory for
    nothing. It is asked where there are no files; those that cannot be read are an error here as in loading.
    """
    try:
        with open_source(path) as source:
            found = {name: source.dtype(name) for name in source.names if len(source.shape(name)) > 1}
    except CheckpointError:
        if has_any_weights(path):
            raise
        found = {}
    found = {name: dtype for name, dtype in found.items() if dtype in PLAIN}
    if len(set(found.values())) > 1:  # perhaps of routers, or of tensors that no block has
        model = model_spec(config)
        weights = {model.embedding.tensor}.union(*(linear.tensors for linear in model.linears))
        found = {name: dtype for name, dtype in found.items() if name in weights}
    dtypes = set(found.values()) or {config.dtype or "bf16"}
    if len(dtypes) == 1:
        return weight_formats(dtypes.pop())
    return WeightFormats("bf16", found.get(tensor_name("embed"), "bf16"), found)
