"""What was measured of a model and is kept for later plans of it, where it lies.

It is JSON in the user's cache folder, beside the profiles of machines.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from cpu_kernels.team.kept_files import UnusableFileError, cache_home, read_kept, why_not_writable, write_kept

MOST_KEPT_BYTES = 64 << 20


def kept_path(kind: str, model: Path) -> Path | None:
    """Where something of a kind is kept of a model; None where there is no home folder."""
    name = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16]
    home = cache_home()
    return None if home is None else home / "hetero_attn" / kind / f"{name}.json"


def keep(kind: str, model: Path, content: dict[str, Any], what: str) -> None:
    """Keep it in place of what was before; warns where that is not possible. what: for the warning."""
    path = kept_path(kind, model)
    reason = "there is no home folder" if path is None else why_not_writable(path)
    try:
        if not reason:
            write_kept(path, f"{json.dumps(content)}\n".encode())
    except UnusableFileError as error:
        reason = str(error)
    if reason:
        warnings.warn(f"{what} not kept ({reason}); XDG_CACHE_HOME names another folder", stacklevel=4)


def kept(kind: str, model: Path) -> dict[str, Any]:
    """What is kept; empty where nothing is, where it is not to be trusted, or damaged."""
    path = kept_path(kind, model)
    try:
        found = {} if path is None else json.loads(read_kept(path, MOST_KEPT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
