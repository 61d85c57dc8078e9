"""The source of the four packages as `ast` reads it: files, names of modules, and what may import what."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MAY_IMPORT = {
    "cpu_kernels": set(),
    "gpu_kernels": set(),
    "placement": set(),
    "hetero_attn": {"cpu_kernels", "gpu_kernels", "placement"},
}
HOLD_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


@functools.cache
def sources(package: str) -> tuple[Path, ...]:
    """Every Python file of a package; a package without any is a failure, not an empty check."""
    found = tuple(sorted((ROOT / package).rglob("*.py")))
    assert found, f"{package}/ holds no Python file"
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax of a file, read once for all tests; nothing changes it."""
    return ast.parse(path.read_text())


@functools.cache
def statements_of(tree: ast.AST) -> tuple[ast.AST, ...]:
    """Every statement of a syntax tree. No expression holds one, and most nodes are of expressions."""
    children = [node for node in ast.iter_child_nodes(tree) if isinstance(node, HOLD_STATEMENTS)]
    return tuple(each for child in children for each in (child, *statements_of(child)))


@functools.cache
def module_name(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
