"""The drawing of help without what it does not draw: Typer's module for it imports a reader of Markdown and a painter
of tracebacks, a quarter of the time of `--help`. Our help is no Markdown, and tracebacks are Python's own.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
HELP = {"-h", "--help"}


def draw_lightly(arguments: Sequence[str]) -> None:
    """Import what draws help, where that is asked for, with stand-ins for what it never uses; whoever imports those
    modules later gets them as they are."""
    if arguments and not HELP.intersection(arguments):
        return
    placed = {module: _stand_in(module, name) for module, name in UNUSED.items() if module not in sys.modules}
    sys.modules.update(placed)
    try:
        with suppress(ImportError):  # a Typer that wants more of them imports them itself, a little later
            import typer.rich_utils  # noqa: F401
    finally:
        for module in placed:
            del sys.modules[module]


def _stand_in(module: str, name: str) -> ModuleType:
    made = ModuleType(module)
    setattr(made, name, type(name, (), {}))
    return made
