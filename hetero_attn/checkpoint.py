"""The weights of a model on disk: safetensors, single or sharded, read tensor by tensor or by row range.

A `Checkpoint` knows names, shapes, dtypes and byte ranges; it never holds weights. The headers of the weight files are
the truth; `model.safetensors.index.json` only says which files there are. Pickle files (.bin, .pt) are never opened.
"""

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hetero_attn.config import ModelConfig
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.json_fields import read_json
from hetero_attn.safetensors_file import SafetensorsFile, TensorEntry

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
_LAYER_PREFIX = "model.layers."
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_COMPARED_ROWS = 4096  # rows of a vocabulary matrix compared at a time: tens of MB


# Our word for each part of the model -> where the Llama, Mistral and Qwen families keep it.
_TOP_PARTS = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tensor_name(part: str, layer: int | None = None, kind: str = "weight") -> str:
    """Name in the checkpoint of one part of the model.

    Args:
        part: embed, final_norm, head (layer None), or, in a layer: attention_norm, q, k, v, q_norm, k_norm, o,
            mlp_norm, gate, up, down.
        layer: layer index. kind: "weight" or "bias".
    """
    if layer is None:
        return f"{_TOP_PARTS[part]}.{kind}"
    return f"{_LAYER_PREFIX}{layer}.{_LAYER_PARTS[part]}.{kind}"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model must have, name -> shape; weights are [out_features, in_features]. No head when tied."""
    vocab_shape = (config.vocab_size, config.hidden_size)
    expected = {tensor_name("embed"): vocab_shape, tensor_name("final_norm"): (config.hidden_size,)}
    if not config.tie_word_embeddings:
        expected[tensor_name("head")] = vocab_shape
    for layer in range(config.num_layers):
        expected |= _layer_tensors(config, layer)
    return expected


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "q": (q_width, hidden, config.qkv_bias),
        "k": (kv_width, hidden, config.qkv_bias),
        "v": (kv_width, hidden, config.qkv_bias),
        "o": (hidden, q_width, config.o_bias),
        "gate": (intermediate, hidden, config.mlp_bias),
        "up": (intermediate, hidden, config.mlp_bias),
        "down": (hidden, intermediate, config.mlp_bias),
    }
    tensors: dict[str, tuple[int, ...]] = {}
    for part, (out_features, in_features, has_bias) in linears.items():
        tensors[tensor_name(part, layer)] = (out_features, in_features)
        if has_bias:
            tensors[tensor_name(part, layer, "bias")] = (out_features,)
    tensors |= {tensor_name(part, layer): (hidden,) for part in ("attention_norm", "mlp_norm")}
    if config.qk_norm:
        tensors |= {tensor_name(part, layer): (config.head_dim,) for part in ("q_norm", "k_norm")}
    return tensors


class Checkpoint:
    """The tensors of one model directory. Made by `Checkpoint.open`; close it, or use it as a context manager.

    Reading is safe from several threads at once.

    Attributes:
        path: the model directory.
        warnings: oddities met on opening that do not change the weights, in plain words.
    """

    def __init__(self, path: Path, files: list[SafetensorsFile], warnings: list[str]):
        self.path = path
        self.warnings = warnings
        self._files = files
        self._entries = {name: entry for file in files for name, entry in file.entries.items()}

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open the safetensors files of a model directory and check every header; no weight is read.

        Args:
            path: local directory with `model.safetensors`, or `model.safetensors.index.json` and the files it names.

        Raises:
            CheckpointError: files are missing, truncated, empty, not safetensors, contradict each other, or are there
                only in another format.
        """
        path = Path(path)
        weight_map = _weight_map(path)
        files: list[SafetensorsFile] = []
        try:
            for file_name in sorted(set(weight_map.values())) or [SINGLE_NAME]:
                files.append(SafetensorsFile(path / file_name))
            if not any(file.entries for file in files):
                raise CheckpointError(f"{path}: the weight files hold no tensors; download the checkpoint again")
            _check_unique(files)
            warnings = _compare_with_index(path, weight_map, files)
        except BaseException:
            for file in files:
                file.close()
            raise
        return cls(path, files, warnings)

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
        return _DTYPES.get(self._entry(name).dtype, self._entry(name).dtype)

    def torch_dtype(self, name: str) -> "torch.dtype":
        """The dtype that `read` returns for tensor `name`; CheckpointError where it is one that cannot be run."""
        import torch

        entry = self._entry(name)
        _check_dtype(entry, name)
        return getattr(torch, _TORCH_DTYPES[entry.dtype])

    def read(self, name: str, rows: slice | None = None, out: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Read a tensor, or a range of its rows, from disk; no other byte is read.

        Args:
            name: tensor name. rows: range of the first dimension, step 1; None reads everything.
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
        out = torch.empty(shape, dtype=dtype) if out is None else out
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu", (
            f"out for {name} is {out.dtype} {tuple(out.shape)} on {out.device}, expected {dtype} {shape} on cpu"
        )
        row_bytes = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        entry.file.read_into(buffer, entry.offset + start * row_bytes)
        return out

    def check(self, config: ModelConfig) -> list[str]:
        """Compare the tensors with what `config` asks for.

        Returns:
            Warnings in plain words: those of opening, and tensors that the model does not use.

        Raises:
            CheckpointError: tensors missing, of the wrong shape, of a dtype that cannot be run, layers beyond
                `config.num_layers`, or a head that a tied model would ignore.
        """
        expected = expected_tensors(config)
        if missing := [name for name in expected if name not in self]:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors that config.json asks for are missing from "
                f"the weight files: {_some(missing)}. Download the checkpoint again, or correct config.json"
            )
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        unexpected = [name for name in self.names if name not in expected]
        if config.tie_word_embeddings and tensor_name("head") in unexpected:
            unexpected.remove(tensor_name("head"))
            self._check_tied(tensor_name("embed"), tensor_name("head"))
        self._check_layers(unexpected, config.num_layers)
        if not unexpected:
            return list(self.warnings)
        unused = f"{self.path}: {len(unexpected)} tensors are not used by this model: {_some(unexpected)}"
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

    def _check_layers(self, unexpected: list[str], num_layers: int) -> None:
        layers = {
            name.removeprefix(_LAYER_PREFIX).split(".")[0] for name in unexpected if name.startswith(_LAYER_PREFIX)
        }
        extra = sorted(int(layer) for layer in layers if layer.isdecimal() and int(layer) >= num_layers)
        if extra:
            raise CheckpointError(
                f"{self.path}: the weight files have layers up to {extra[-1]}, but num_hidden_layers in config.json is "
                f"{num_layers}, so {len(extra)} layers would be dropped; correct config.json or download both again"
            )


def _some(names: list[str], limit: int = 10) -> str:
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _check_dtype(entry: TensorEntry, name: str) -> None:
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{entry.file.path}: tensor {name} has dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}; use a "
            "checkpoint with fp32, fp16 or bf16 weights"
        )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name from the index, empty for a single file; all the files named are there."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory; expected a model directory with {SINGLE_NAME}")
    if (path / SINGLE_NAME).exists():
        return {}
    if not (path / INDEX_NAME).exists():
        raise CheckpointError(_why_no_weights(path))
    try:
        weight_map = read_json(path / INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_NAME}: no weight_map object in it; download it again")
    for tensor, file_name in weight_map.items():
        _check_file_name(path, tensor, file_name)
    file_names = sorted(set(weight_map.values()))
    if missing := [name for name in file_names if not (path / name).exists()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(file_names)} weight files that {INDEX_NAME} names are missing: "
            f"{', '.join(missing)}. Download them again"
        )
    return weight_map


def _check_file_name(path: Path, tensor: str, file_name: object) -> None:
    """Bare names only: an index from the internet must not reach files outside the model directory.

    Symlinks are followed, because the hub's cache is made of them; they are the doing of whoever owns the directory.
    """
    if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
        raise CheckpointError(
            f"{path / INDEX_NAME}: tensor {tensor} is mapped to {str(file_name)[:200]!r}, expected the bare name of a "
            ".safetensors file in the same directory; do not use this checkpoint"
        )


def _why_no_weights(path: Path) -> str:
    """What is in the directory instead of weights that can be loaded, and what to do about it."""
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    expected = f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} found"
    if pickles := [name for name in files if Path(name).suffix in _PICKLE_SUFFIXES]:
        return (
            f"{expected}, only {_some(pickles)}; pickle files can run code when they are opened, so hetero_attn never "
            "opens them. If you trust this one, convert it once and copy the tokenizer files beside the result: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path.name}-safetensors')\""
        )
    if others := [name for name in files if name.endswith((".safetensors", ".gguf"))]:
        return f"{expected}, only {_some(others)}; download the whole checkpoint in Hugging Face format"
    return f"{expected}; the directory holds {_some(files) or 'no files'}. Check the path or download the model again"


def _check_unique(files: list[SafetensorsFile]) -> None:
    holder: dict[str, Path] = {}
    for file in files:
        for name in file.entries:
            if name in holder:
                raise CheckpointError(
                    f"{file.path}: tensor {name} is in {holder[name].name} too; each tensor belongs in one file. "
                    "Download the checkpoint again"
                )
            holder[name] = file.path


def _compare_with_index(path: Path, weight_map: dict[str, str], files: list[SafetensorsFile]) -> list[str]:
    """Warnings about tensors that the index places in another file; an error for tensors that are nowhere."""
    actual = {name: file.path.name for file in files for name in file.entries}
    if absent := [name for name in weight_map if name not in actual]:
        raise CheckpointError(
            f"{path / INDEX_NAME}: names {len(absent)} tensors that no weight file holds: {_some(absent)}. Download "
            "the checkpoint again"
        )
    moved = [name for name, file_name in weight_map.items() if actual[name] != file_name]
    if not moved:
        return []
    return [f"{path / INDEX_NAME}: {len(moved)} tensors are in another file than it says: {_some(moved)}"]
