"""`quantize`: a model as a GGUF file with every weight in a type of its own."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpu_kernels import CpuKernels
from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.config import STANDS_STILL, gguf_terms
from hetero_attn.checkpoints.gguf.file import GgufTensor
from hetero_attn.checkpoints.gguf.names import ROPE_DIVISORS
from hetero_attn.checkpoints.gguf.writer import NewTensor, expect_room, write_gguf
from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.loading.run_rows import numbers_of
from hetero_attn.checkpoints.row_order import is_rotated, turned
from hetero_attn.checkpoints.sources import open_source, read_config
from hetero_attn.errors import ArgumentError, CheckpointError
from hetero_attn.models.decoder import decoder
from hetero_attn.serving.progress import bytes_bar
from hetero_attn.spec.config import ModelConfig
from hetero_attn.tools.quantize.calibrate import calibration
from hetero_attn.tools.quantize.choose import RECIPES, Loss, as_large_as, bits_of, by_bits, by_recipe
from hetero_attn.tools.quantize.encode import encode
from hetero_attn.tools.quantize.expected import expected_losses, own_types
from hetero_attn.tools.quantize.header.metadata import check_same_model, copied_metadata, made_metadata, made_terms
from hetero_attn.tools.quantize.header.tokenizer_keys import tokenizer_metadata
from hetero_attn.tools.quantize.stacks import new_tensor, spread, stack_of, stacks
from hetero_attn.tools.quantize.table import KEY, table_text

RUN_WEIGHTS = 1 << 24  # read and encoded at once
DEFAULT_RECIPE = "q4_m"


@dataclass(frozen=True, slots=True)
class QuantizedFile:
    """What was written. bits: of a weight, over all matrices. types: by our names of tensors."""

    path: Path
    nbytes: int
    bits: float
    types: Mapping[str, str]
    table: str


@dataclass(frozen=True, slots=True)
class _NewFile:
    """What a file says beside its weights. is_turned: whether rows of q and k are stored as pairs. divisors: of the
    rotary frequencies, where the file keeps them."""

    metadata: dict[str, Any]
    is_turned: bool
    divisors: torch.Tensor | None


def quantize(
    model: str | Path,
    out: Path,
    recipe: str | None = None,
    bits: float | None = None,
    text: str = "",
    force: bool = False,
    threads: int | None = None,
    measured: Mapping[str, Loss] | None = None,
    tokenizer: str | Path | None = None,
) -> QuantizedFile:
    """Write a model to the GGUF file `out`, as large as a recipe of RECIPES is, or with at most so many bits a weight.

    text: on which the effect of every linear is measured when `bits` are given, and for whose activations all weights
    are rounded; "" rounds each weight to the nearest, and their effects are what `expected` says. Codes that a GGUF
    source already has in the type chosen are copied. force: write over a file. measured: those effects, where they are
    known from another file of the model. tokenizer: a folder, file or hub id whose tokenizer reads the text instead of
    the model's own. Raises ArgumentError for another recipe or a file that is there, CheckpointError, ConfigError,
    PromptError or UnsupportedModelError before anything is written, and CheckpointError where the disk is full.
    """
    _check(out, recipe, force)
    path = resolve_model(model)
    config, ops, recipe = read_config(path), CpuKernels(threads), recipe or DEFAULT_RECIPE
    spec = decoder(config)
    with open_source(path) as source:
        source.check(spec)
        shapes = spec.tensors
        chosen = by_recipe(RECIPES[recipe], shapes, {name: source.dtype(name) for name in shapes})
        expect_room(out, int((bits or bits_of(chosen, shapes)) * _num_weights(shapes) / 8))
        new, own = _new_file(source, config, shapes, chosen), own_types(source, shapes)
        with calibration(path, text, ops, threads, tokenizer) if text else nullcontext() as calibrated:
            if bits is not None and calibrated is not None:
                measured = measured or calibrated.losses(own)
            losses = measured or expected_losses(source, shapes, config.num_layers, config.head_dim, own, ops)
            chosen = _chosen(chosen, losses, bits, shapes)
            encoded = {} if calibrated is None else calibrated.encoded(_changed(chosen, own))
        wanted = f"{bits:g} bits" if bits is not None else f"recipe {recipe}"
        table = table_text(wanted, bits_of(chosen, shapes), chosen, measured or {})
        new.metadata[KEY] = table
        weights = _Weights(source, config.head_dim, shapes, chosen, encoded, ops)
        nbytes = _write(new, weights, out, force)
    return QuantizedFile(out, nbytes, bits_of(chosen, shapes), chosen, table)


def _check(out: Path, recipe: str | None, force: bool) -> None:
    """Raise ArgumentError for a file that is there, for what is none, or a recipe that is unknown."""
    if out.exists() and not out.is_file():
        raise ArgumentError(f"--out is {out}, which is no file; give the name of one")
    if out.exists() and not force:
        raise ArgumentError(f"--out is {out}, which is there already; give another name, or --force to write over it")
    if recipe is not None and recipe not in RECIPES:
        raise ArgumentError(f"recipe is {recipe!r}; known: {', '.join(RECIPES)}")


def _num_weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights all matrices have."""
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def _changed(chosen: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The types that a source's tensors do not have already."""
    return {name: kind for name, kind in chosen.items() if own.get(stack_of(name)) != kind}


def _chosen(
    types: Mapping[str, str], losses: Mapping[str, Loss], bits: float | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The types of all tensors for so many bits a weight, None for as many as `types` have. Matrices without losses
    keep theirs."""
    if bits is None:
        found = as_large_as(types, losses, shapes)
    else:
        fixed = [name for name in types if len(shapes[name]) == 2 and stack_of(name) not in losses]
        weights = sum(shapes[name][0] * shapes[name][1] for name in fixed)
        nbytes = round(bits_of(types, shapes, fixed) * weights / 8) if fixed else 0
        found = by_bits(losses, bits, nbytes, weights)
    return {**types, **spread(found, types)}


def _new_file(
    source: Checkpoint | GgufCheckpoint,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    chosen: Mapping[str, str],
) -> _NewFile:
    """Raises UnsupportedModelError for a model that no file can say; which types are chosen does not matter."""
    if isinstance(source, GgufCheckpoint):
        metadata, is_turned = copied_metadata(source), gguf_terms(source.fields).is_turned
        divisors = _stored_divisors(config)
    else:
        terms = made_terms(config, source.path)
        is_turned = terms.is_turned
        metadata, divisors = made_metadata(config, terms, source.path.name)
        metadata |= tokenizer_metadata(source.path, config)
    tensors = _new_tensors(shapes, chosen, divisors)
    placed = {item.name: GgufTensor(None, item.type, item.shape, 0, item.nbytes) for item in tensors}  # type: ignore[arg-type]
    check_same_model(config, metadata, placed, divisors, source.path)
    return _NewFile(metadata, is_turned, divisors)


def _stored_divisors(config: ModelConfig) -> torch.Tensor | None:
    """What the tensor of rotary divisors of a GGUF source holds, which is of one kind of layers; None without it."""
    for layer in range(config.num_layers):
        if config.rope_of(layer).rope_type == "divisors":
            found = torch.tensor(config.rope_of(layer).divisors, dtype=torch.float32, device="cpu")
            return found.clamp(max=STANDS_STILL)
    return None


def _new_tensors(
    shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, str], divisors: torch.Tensor | None
) -> list[NewTensor]:
    tensors = [new_tensor(names, chosen[names[0]], shapes[names[0]]) for names in stacks(chosen).values()]
    if divisors is not None:
        tensors.append(NewTensor(ROPE_DIVISORS, GGUF_BY_NAME["F32"], tuple(divisors.shape)))
    return tensors


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the tensors of a new file are made of: those of a model in `shapes`, each as the type `chosen` for it. Those
    in `encoded` are so already; the others are read from `source`."""

    source: Checkpoint | GgufCheckpoint
    head_dim: int
    shapes: Mapping[str, tuple[int, ...]]
    chosen: Mapping[str, str]
    encoded: Mapping[str, torch.Tensor]
    ops: CpuKernels

    def pieces(self, name: str, is_turned: bool) -> Iterator[np.ndarray]:
        """The bytes of a tensor, its heads turned or not, some rows at a time."""
        if name not in self.encoded:
            return self._rounded(name, is_turned)
        rows = self.encoded[name]
        return iter([(turned(rows, self.head_dim) if is_turned else rows).numpy()])

    def _rounded(self, name: str, is_turned: bool) -> Iterator[np.ndarray]:
        """Some whole heads of rows at a time: each weight rounded to the nearest, or the source's codes where it has
        them in the type wanted."""
        source, wanted, shape, head_dim = self.source, self.chosen[name], self.shapes[name], self.head_dim
        if len(shape) == 1:
            values = source.read(name).float()
            yield turned(values, head_dim).numpy().view(np.uint8) if is_turned else values.numpy().view(np.uint8)
            return
        rows, in_features = shape
        step = max(1, RUN_WEIGHTS // in_features // head_dim) * head_dim
        for start in range(0, rows, step):
            values = source.read(name, slice(start, min(rows, start + step)))
            kind = source.source_type(name)
            if kind == wanted and isinstance(source, GgufCheckpoint):
                yield (turned(values, head_dim) if is_turned else values).numpy()
                continue
            values = numbers_of(source, self.ops, name, values)
            if not torch.isfinite(values).all():
                raise CheckpointError(f"{source.path}: {name} holds NaN or infinite values; the checkpoint is damaged")
            yield encode(wanted, turned(values, head_dim) if is_turned else values.contiguous()).numpy()


def _write(new: _NewFile, weights: _Weights, out: Path, force: bool) -> int:
    tensors = _new_tensors(weights.shapes, weights.chosen, new.divisors)
    names_of = dict(zip((tensor.name for tensor in tensors), stacks(weights.chosen).values(), strict=False))
    with bytes_bar(sum(item.nbytes for item in tensors), f"writing {out.name}") as bar:

        def data(tensor: NewTensor) -> Iterator[np.ndarray]:
            if tensor.name == ROPE_DIVISORS:
                yield new.divisors.numpy().view(np.uint8)
                return
            for name in names_of[tensor.name]:
                for piece in weights.pieces(name, new.is_turned and is_rotated(name)):
                    bar.update(piece.nbytes)
                    yield piece

        return write_gguf(out, new.metadata, tensors, data, force)
