"""Which files hold the weights of a model directory: one safetensors file, or those that an index names."""

import re
from pathlib import Path

from hetero_attn.checkpoints.safetensors import SafetensorsFile, is_tensor_name
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.spec.json_fields import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
MAX_FILES = 4096
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_WEIGHT_SUFFIXES = _PICKLE_SUFFIXES | {".safetensors"}
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")


def open_files(path: Path) -> tuple[list[SafetensorsFile], list[str]]:
    """The open weight files of a model directory, which the caller closes, and warnings in plain words.

    Raises:
        CheckpointError: files are missing, truncated, empty, not safetensors, contradict each other, or are there only
            in another format; none stays open then.
    """
    weight_map = _weight_map(path)
    files: list[SafetensorsFile] = []
    try:
        for file_name in sorted(set(weight_map.values())) or [SINGLE_NAME]:
            files.append(SafetensorsFile(path / file_name))
        if not any(file.entries for file in files):
            raise CheckpointError(f"{path}: the weight files hold no tensors; download the checkpoint again")
        _check_unique(files)
        return files, _compare_with_index(path, weight_map, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def has_weight_files(path: Path) -> bool:
    """Whether a model directory holds safetensors, or an index that names them."""
    return (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()


def has_any_weights(path: Path) -> bool:
    """Whether a model directory holds a weight file of any kind, rather than a config that is there to be planned."""
    return any(file.suffix in _WEIGHT_SUFFIXES for file in path.iterdir())


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
    if len(file_names) > MAX_FILES:
        raise CheckpointError(
            f"{path / INDEX_NAME}: names {len(file_names)} weight files, at most {MAX_FILES} are expected; no model "
            "has so many, do not use it"
        )
    if missing := [name for name in file_names if not (path / name).exists()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(file_names)} weight files that {INDEX_NAME} names are missing: "
            f"{some(missing)}. Download them again"
        )
    return weight_map


def _check_file_name(path: Path, tensor: str, file_name: object) -> None:
    """Bare names only: an index from the internet must not reach files outside the model directory.

    Symlinks are followed, because the hub's cache is made of them; they are the doing of whoever owns the directory.
    """
    if not is_tensor_name(tensor) or not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
        raise CheckpointError(
            f"{path / INDEX_NAME}: tensor {tensor[:60]} is mapped to {str(file_name)[:40]!r}, expected the bare name "
            "of a .safetensors file in the same directory; do not use this checkpoint"
        )


def _why_no_weights(path: Path) -> str:
    """What is in the directory instead of weights that can be loaded, and what to do about it."""
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    expected = f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} found"
    if pickles := [name for name in files if Path(name).suffix in _PICKLE_SUFFIXES]:
        return (
            f"{expected}, only {some(pickles)};\npickle files can run code when they are opened, so hetero_attn never "
            "opens them. If you trust this one, convert it once and copy the tokenizer files beside the result:\n"
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path.name}-safetensors')\""
        )
    if others := [name for name in files if name.endswith((".safetensors", ".gguf"))]:
        return f"{expected}, only {some(others)}; download the whole checkpoint in Hugging Face format"
    alone = "; `hetero-attn plan --dtype q4` needs config.json alone" if "config.json" in files else ""
    held = f"{expected}; the directory holds {some(files) or 'no files'}"
    return f"{held}.\nCheck the path or download the model again{alone}"  # a long line is cut in its middle


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
            f"{path / INDEX_NAME}: names {len(absent)} tensors that no weight file holds: {some(absent)}. Download "
            "the checkpoint again"
        )
    moved = [name for name, file_name in weight_map.items() if actual[name] != file_name]
    if not moved:
        return []
    return [f"{path / INDEX_NAME}: {len(moved)} tensors are in another file than it says: {some(moved)}"]


def some(names: list[str], most_characters: int = 120) -> str:
    """The first names of a list in words, at least one, and how many more there are."""
    shown, length = names[:1], len(names[0]) if names else 0
    for name in names[1:]:
        length += len(name) + 2
        if length > most_characters:
            break
        shown.append(name)
    hidden = len(names) - len(shown)
    return ", ".join(shown) + (f", and {hidden} more" if hidden else "")
