"""Faults planted in a copy of a source file: a piece of it is replaced, wherever its lines break."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType


def replaced(source: str, right: str, wrong: str) -> str:
    """`source` with every occurrence of `right` replaced; line breaks, white space and the comma that a formatter puts
    before a closing bracket do not count. Raises AssertionError where there is none."""
    margin = len(right) - len(right.lstrip())
    if right[:margin] == wrong[:margin]:  # both are whole lines
        right, wrong = right[margin:], wrong[margin:]
    tokens = re.findall(r"\w+|[^\w\s]", right)
    pieces = [rf"(?:,\s*)?{re.escape(token)}" if token in ")]}" else re.escape(token) for token in tokens]
    pattern = r"\b" * tokens[0][0].isalnum() + r"\s*".join(pieces) + r"\b" * tokens[-1][-1].isalnum()
    found, count = re.subn(pattern, lambda _: wrong, source)
    assert count, f"the source no longer holds {right!r}; update the mutant"
    return found


def load_mutant(folder: Path, source: Path, right: str, wrong: str) -> ModuleType:
    """The module at `source` with a fault in it, as a new module whose file is in `folder`."""
    path = folder / f"mutant_{source.stem}.py"
    path.write_text(replaced(source.read_text(), right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
