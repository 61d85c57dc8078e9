"""The models that `gpu_offload.py` runs: random weights of known shapes, quickly made, and the caps they run under."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from models.random_checkpoint import MODEL_FILE, SHAPES, Shape, header_of

from .run import Run

DRAWN_VALUES = 4_000_037  # a prime, so that no two rows of a matrix are equal
LARGE_SHAPES = {
    "8b": replace(SHAPES["llama-3.2-1b"], hidden_size=4096, num_layers=32, head_dim=128, intermediate_size=14_336),
    "tiny": replace(SHAPES["tiny"], max_positions=2048),
}  # fmt: skip


def cap_bytes(shape: str, dtype: str, share: float, quick: bool = False) -> int:
    """The GPU budget that leaves room for `share` of the weights beside what else must be there."""
    from placement.machine.rates import weight_bytes_of

    dims = [size for size in LARGE_SHAPES[shape].tensors().values() if len(size) == 2]
    weights = sum(rows * columns for rows, columns in dims) * weight_bytes_of(dtype)
    fixed = 64 << 20 if quick else 3 << 29  # context, temporaries, activations, the cache of some thousand tokens
    return int(share * weights) + fixed


def checkpoint(run: Run, shape: str) -> Path:
    """A checkpoint of the shape, made on first use."""
    return made_checkpoint(run.work_dir, shape)


def made_checkpoint(work_dir: Path, shape: str) -> Path:
    """The folder of a checkpoint whose layers have the values of one; where another process writes it, this waits."""
    directory = work_dir / shape
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back when its holder dies
        if not (directory / MODEL_FILE).exists():
            (directory / "config.json").write_text(json.dumps(LARGE_SHAPES[shape].config(), indent=2))
            write_repeated(LARGE_SHAPES[shape], directory / MODEL_FILE)
    return directory


def write_repeated(shape: Shape, path: Path) -> None:
    """One safetensors file; tensors of equal shape hold equal values."""
    generator, made = np.random.Generator(np.random.SFC64(0)), {}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header_of(shape))
        for dims in shape.tensors().values():
            if dims not in made:
                made[dims] = random_bits(generator, dims)
            made[dims].tofile(file)
    partial.rename(path)


def random_bits(generator: np.random.Generator, dims: tuple[int, ...]) -> np.ndarray:
    """bf16 values of variance 1 / columns, some megabytes of them over and over; ones for norms."""
    if len(dims) == 1:
        return np.full(dims, 0x3F80, dtype=np.uint16)
    values = generator.random(DRAWN_VALUES, dtype=np.float32)
    values -= 0.5
    values *= np.float32((12 / dims[1]) ** 0.5)
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), dims)
