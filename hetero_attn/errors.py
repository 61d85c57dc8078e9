"""Every error that a user of hetero_attn can meet, and the exit code the command line gives it.

An error names the thing, what was found, what was expected and the way out. Errors about what a user wrote are also
`ValueError`, so that callers who never heard of this module catch them by the usual name.

Exit codes: 2 usage, prompt or policy; 3 checkpoint or config; 4 memory or plan; 5 at run time.
"""

import difflib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

NEIGHBOURS = ("cpu_kernels", "gpu_kernels", "placement")  # installed beside this package

MOST_CHARACTERS = 300  # of a line of a message; its end is kept too, because that is where the way out stands
KEPT_END = 90
LONGEST_WORD = 40  # which is left out whole where a line is cut
MOST_LINES = 12  # a rule that is wrong for one layer is wrong for eighty


class HeteroError(Exception):
    """Base of all errors raised on purpose by hetero_attn. Exit code 5 unless a subclass says otherwise.

    Its message is made fit to be shown: see `printable`.
    """

    exit_code: int = 5

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class CheckpointError(HeteroError):
    """Weight files that are missing, damaged or do not fit the config. Exit code 3."""

    exit_code = 3


class ConfigError(HeteroError, ValueError):
    """A `config.json` (or another small JSON file) that cannot be read or holds an impossible value. Exit code 3."""

    exit_code = 3


class ArgumentError(ConfigError):
    """An argument of a call that is of the wrong kind or outside its range. Exit code 2."""

    exit_code = 2


class ContextLimitError(ConfigError):
    """A context longer than the positions that a model was made for, which are `limit`. Exit code 3."""

    def __init__(self, max_context: int, limit: int) -> None:
        super().__init__(
            f"max_context is {max_context}, but the model was made for {limit} positions; ask for at most {limit}"
        )
        self.limit = limit


class UnsupportedModelError(HeteroError, ValueError):
    """A well-formed model that hetero_attn does not run: architecture, rope type, quantisation. Exit code 3."""

    exit_code = 3


class PromptError(HeteroError, ValueError):
    """A prompt that is empty, too long for the context, or holds token ids outside the vocabulary. Exit code 2."""

    exit_code = 2


class MissingTokenizerError(PromptError):
    """Text for or from a model that has no tokenizer. Exit code 3."""

    exit_code = 3

    def __init__(self, model: str, other_way: str = "") -> None:
        lacks = "has no tokenizer files" + ", nor a vocabulary of its own" * model.endswith(".gguf")
        where = "the folder, GGUF file or hub id of a model with the same tokens"
        super().__init__(f"{model} {lacks}; name {where} by tokenizer=...{other_way}")


class SamplingError(HeteroError, ValueError):
    """A sampling parameter outside its range, called `parameter` in `SamplingParams`. Exit code 2."""

    exit_code = 2

    def __init__(self, message: str = "", parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class MemoryBudgetError(HeteroError, ValueError):
    """A GPU, pinned or host memory budget that no plan can meet. Exit code 4."""

    exit_code = 4


class EngineDeadError(HeteroError):
    """The engine is closed, was made before a fork, or met a fault that it cannot recover from. Exit code 5."""


class BusyError(HeteroError):
    """A call from inside a step of the same thread that would have to wait for that step. Exit code 5."""


class QueueFullError(HeteroError):
    """As many requests wait as the queue may hold; ask again later. Exit code 5."""


class NonFiniteLogitsError(HeteroError):
    """The model produced NaN or infinite logits, so no token can be chosen. Exit code 5."""


class ShadowedPackageError(HeteroError, ImportError):
    """Another file or package has the name of one of ours and is found first. Exit code 5."""


def check_neighbours() -> None:
    """Raise ShadowedPackageError where a file or package of another has the name of one of ours and is found first.

    Asked for before anything is imported: a shadow may serve some imports and fail at others, much later.
    """
    home = Path(__file__).resolve().parents[1]
    for name in NEIGHBOURS:
        found = sys.modules.get(name)
        spec = getattr(found, "__spec__", None) if found is not None else importlib.util.find_spec(name)
        place = getattr(found, "__file__", None) or getattr(spec, "origin", None)
        if place is None or Path(place).resolve() != home / name / "__init__.py":
            where = f"{place} is found first" if place else "it is not found"
            raise ShadowedPackageError(
                f"hetero_attn needs its own package {name!r} of {home / name}, but {where}; rename that file or "
                "folder, or install hetero_attn where no other package has that name"
            )


def nearest(name: str, known: Iterable[str], end: str = "") -> str:
    """A suggestion for a misspelt name, to be appended to an error message.

    Args:
        name: what the user wrote; case does not matter.
        known: the valid names.
        end: what names of a kind end in; where `name` does too, it is not compared.

    Returns:
        `" (did you mean 'x'?)"` when one of `known` is close to `name`, else the empty string.
    """
    end = end if name.endswith(end) else ""
    spelt = {each.removesuffix(end).lower(): each for each in known}
    matches = difflib.get_close_matches(name.removesuffix(end).lower(), spelt, n=1)
    return f" (did you mean {spelt[matches[0]]!r}?)" if matches else ""


def printable(message: str) -> str:
    """A message as it may be shown: control characters escaped, lines cut in their middle, between words where they can
    be, at most MOST_LINES of them.

    The one place through which every message to a person passes: names and values in it come from files of strangers. A
    control character would move a terminal's cursor, and a name of megabytes would bury what the message says.
    """
    lines = message.split("\n", MOST_LINES)
    hidden = message.count("\n") + 1 - MOST_LINES
    shown = [_cut(line) for line in lines[:MOST_LINES]]
    return "\n".join(shown if hidden <= 0 else [*shown, f"... and {hidden} more problems"])


def _cut(line: str) -> str:
    if len(line) > MOST_CHARACTERS:
        begin, end = line[: MOST_CHARACTERS - KEPT_END - len(" ... ")], line[-KEPT_END:]
        head, _, rest = begin.rpartition(" ")
        first, _, tail = end.partition(" ")
        begin, end = head if len(rest) < LONGEST_WORD else begin, tail if len(first) < LONGEST_WORD else end
        line = f"{begin} ... {end}"
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
