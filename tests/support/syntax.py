"""The source of the four packages as `ast` reads it: files, names of modules, and what may import what."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "cpu_kernels": set(),
    "gpu_kernels": set(),
    "placement": set(),
    "hetero_attn": {"cpu_kernels", "gpu_kernels", "placement"},
}


def sources(package: str) -> list[Path]:
    """Every Python file of a package; a package without any is a failure, not an empty check."""
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package}/ holds no Python file"
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax of a file, read once for all tests; nothing changes it."""
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
