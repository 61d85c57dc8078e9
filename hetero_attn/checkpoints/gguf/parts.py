"""A model in GGUF files: one, or the parts that `NAME-00001-of-00003.gguf` counts; metadata is in the first."""

import re
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.gguf.file import GgufFile, GgufTensor
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1000


def first_name(name: str) -> str:
    """The name of the first part of the model that a file of this name is a part of."""
    match = _PART.fullmatch(name)
    return name if match is None else f"{match['stem']}-00001-of-{match['count']}.gguf"


def first_part(path: Path) -> Path:
    """The file that holds the metadata of the model that `path` is a part of."""
    return path.with_name(first_name(path.name))


def open_parts(path: Path, known: KnownHeaders | None = None) -> tuple[list[GgufFile], dict[str, GgufTensor]]:
    """The open files of a model, which the caller closes, and all its tensors. known: as for `GgufFile`.

    Raises:
        CheckpointError: a file is damaged or missing, or the parts contradict each other; none stays open then.
    """
    files: list[GgufFile] = []
    try:
        files.append(GgufFile(first_part(path), known))
        count = _split_count(files[0])
        for number in range(1, count):
            files.append(GgufFile(_part_path(files[0], number, count), known))
        return files, _tensors(files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _split_count(first: GgufFile) -> int:
    count, number = first.metadata.get("split.count", 0), first.metadata.get("split.no", 0)
    if not isinstance(count, int) or not 0 <= count <= MAX_PARTS or number != 0:
        raise CheckpointError(
            f"{first.path}: split.no is {number} and split.count {count}; give the first part, and all parts beside it"
        )
    return count


def _part_path(first: GgufFile, number: int, count: int) -> Path:
    match = _PART.fullmatch(first.path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{first.path}: the header says that this is the first of {count} parts, but the name is not of the form "
            f"NAME-00001-of-{count:05d}.gguf, by which the others are found; rename the parts"
        )
    path = first.path.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
    if not path.exists():
        raise CheckpointError(f"{path}: part {number + 1} of {count} is missing; download it beside the others")
    return path


def _is_of_another(key: str, first: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether a part says otherwise of the model than the first one, which has all that is said of it."""
    return key.startswith("general.") and key != "general.alignment" and str(first.get(key)) != str(part[key])


def _tensors(files: list[GgufFile]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        found = file.metadata.get("split.no", 0)
        if found != number or file.metadata.get("split.count", len(files)) not in (0, len(files)):
            raise CheckpointError(f"{file.path}: split.no is {found}, expected {number} of {len(files)} parts")
        if others := [key for key in file.metadata if _is_of_another(key, files[0].metadata, file.metadata)]:
            raise CheckpointError(
                f"{file.path}: {others[0]} is another than in {files[0].path.name}; the parts are of different models, "
                "download all again"
            )
        if twice := [name for name in file.tensors if name in tensors]:
            raise CheckpointError(f"{file.path}: tensor {twice[0]} is in another part too; download the parts again")
        tensors |= file.tensors
    wanted = files[0].metadata.get("split.tensors.count", len(tensors))
    if len(files) > 1 and wanted != len(tensors):
        raise CheckpointError(
            f"{files[0].path}: the parts hold {len(tensors)} tensors, the header says {wanted}; they are of different "
            "models, download all again"
        )
    return tensors
