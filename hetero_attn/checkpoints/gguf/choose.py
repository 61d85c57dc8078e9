"""Which GGUF model of a folder or repository is meant: by a pattern, among names, parts counted as one model."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from hetero_attn.checkpoints.gguf.parts import first_name
from hetero_attn.errors import CheckpointError

SUFFIX = ".gguf"
NO_MODELS = ("mmproj", "imatrix")  # in the names of projectors of other media and of what quantisers weigh by
MOST_LISTED = 12
# Pieces that were cut by bytes: model.gguf.part00, model.gguf.part1of2, model.gguf-split-a.
_PIECE = re.compile(r"(?P<whole>.+\.gguf)[.-](part|split)[A-Za-z0-9_.-]*", re.IGNORECASE)
HOW = 'file="..." (--gguf on the command line)'


class SeveralModelsError(CheckpointError):
    """A folder or repository of several GGUF models where one was expected. listed: their names."""

    def __init__(self, where: str, listed: str) -> None:
        super().__init__(f"{where}: several GGUF models; say which by {HOW}: {listed}")
        self.listed = listed


def models_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among file names, which may have folders in front: name of the first part -> all there are."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, slash, base = name.rpartition("/")
        if base.endswith(SUFFIX) and not any(word in base.lower() for word in NO_MODELS):
            found.setdefault(f"{folder}{slash}{first_name(base)}", []).append(name)
    return found


def choose_model(where: str, names: Iterable[str], pattern: str | None) -> list[str]:
    """The files of the one model that a pattern means, its first part first; None means the only one.

    pattern: a file's name, or one with wildcards, or what stands in it, such as Q4_K_M; case does not matter.

    Raises:
        CheckpointError: none, or several, which it names (SeveralModelsError without a pattern). where: what the
            message calls the place.
    """
    models = models_of(names)
    found = [first for first in models if pattern is None or _matches(models[first], pattern)]
    if pattern is not None and len(found) > 1:  # a name that is whole goes before what others have in theirs
        found = [first for first in found if _is_named(first, pattern)] or found
    if len(found) == 1:
        return sorted(models[found[0]], key=lambda name: name != found[0])
    shown = found or list(models)
    more = f", and {len(shown) - MOST_LISTED} more" if len(shown) > MOST_LISTED else ""
    listed = (", ".join(shown[:MOST_LISTED]) or "no .gguf file") + more
    if pattern is None:
        raise SeveralModelsError(where, listed)
    what = "several GGUF models match" if found else "no GGUF model matches"
    raise CheckpointError(f"{where}: {what} file={pattern!r}; there are: {listed}")


def expect_whole(where: str, names: Iterable[str]) -> None:
    """CheckpointError where names are those of pieces of a file that was cut by bytes: only joined they are one."""
    for name in names:
        if found := _PIECE.fullmatch(name):
            whole = found["whole"]
            raise CheckpointError(
                f"{where}: {name} is a piece of a GGUF file that was cut by bytes; join all in their order first: "
                f"cat {whole}?* > {whole}"
            )


def _matches(parts: list[str], pattern: str) -> bool:
    wanted = pattern.lower()
    wild = wanted if any(sign in wanted for sign in "*?[") else f"*{wanted}*"
    lowered = [name.lower() for name in parts]
    return any(fnmatchcase(name, wild) or fnmatchcase(name.rpartition("/")[2], wild) for name in lowered)


def _is_named(name: str, pattern: str) -> bool:
    known = {name.lower(), name.rpartition("/")[2].lower()}
    return pattern.lower() in known | {each.removesuffix(SUFFIX) for each in known}
