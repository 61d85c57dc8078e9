"""What compiling a kernel needs of numba's inside, looked up by name, so that a numba without it is told as such."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

KNOWN_VERSIONS = "0.62 to 0.68"  # first and last of numba that kernels were compiled with


class CompileError(RuntimeError):
    """Kernels cannot be compiled as Python is set up. Exit code 5."""

    exit_code = 5


def part(module: str, name: str) -> Any:
    """A class, function or object of one of numba's modules; CompileError where there is none."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise missing(f"{module}.{name}") from error


def expect_members(owner: Any, *names: str) -> None:
    """CompileError unless a class or object of numba has members of these names."""
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            raise missing(f"{kind.__module__}.{kind.__qualname__}.{name}")


def missing(name: str) -> CompileError:
    """The error of a numba that has no such name."""
    return CompileError(
        f"numba {version('numba')} has no {name}, which compiling a CPU kernel needs; numba {KNOWN_VERSIONS} have it: "
        "install one of these (pip install 'numba>=0.62,<0.69')"
    )
