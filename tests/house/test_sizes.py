"""Rooms stay small: how many parameters a function takes, how long a file is. The list of exceptions only shrinks."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.support.suite.syntax import HOLD_STATEMENTS, MAY_IMPORT, ROOT
from tests.support.suite.syntax import sources as files_of

MOST_LINES, MOST_PARAMETERS = 300, 7
MOST_FILES = 14  # in one folder of examples and tests; of the packages see test_imports.py
EVERY_PACKAGES = ("__init__.py", "conftest.py")  # and count in no folder of tests
# Lines of a function beside its signature and docstring. Kernels are loops inside loops that one function writes out.
MOST_BODY_LINES, MOST_KERNEL_LINES = 38, 98
# Functions that are written into machine code, whose arguments are registers and pointers, by their decorators.
COMPILED = ("triton.jit", "helper", "inlined", "emits")
# Who may have more parameters than that, and why.
MANY_PARAMETERS = {
    "hetero_attn/llm.py LLM.__init__": "public: the options of a load, which go into LoadOptions as they are",
    "hetero_attn/planning/settle.py plan_model": "public: the same options, as far as they change a plan",
    "hetero_attn/cli/bench.py bench": "a command's options",
    "hetero_attn/cli/generate.py generate": "a command's options",
    "hetero_attn/cli/plan.py plan": "a command's options",
    "hetero_attn/cli/profile.py profile": "a command's options",
    "hetero_attn/cli/quantize/command.py quantize": "a command's options",
    "hetero_attn/cli/serve/command.py serve": "a command's options",
    "hetero_attn/tools/quantize/write.py quantize": "what its command takes",
    "placement/cost/model.py predict": "a placement, a machine, and by keyword a phase of it",
}


@functools.cache
def functions_of(text: str) -> tuple[tuple[str, ast.FunctionDef], ...]:
    """The functions of a file, which several tests look at."""
    return tuple(functions(ast.parse(text)))


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function in a syntax tree by its name, that of the class or function around it before it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        if isinstance(child, HOLD_STATEMENTS):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            yield from functions(child, f"{prefix}{child.name}." if named else prefix)


def is_compiled(function: ast.FunctionDef) -> bool:
    """Whether a decorator makes machine code of it."""
    return any(ast.unparse(mark).startswith(COMPILED) for mark in function.decorator_list)


def parameter_count(function: ast.FunctionDef) -> int:
    """Parameters of a function, without `self` and `cls`."""
    given = function.args
    names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def with_many_parameters(text: str) -> list[str]:
    """Names of a file's functions with more than MOST_PARAMETERS."""
    found = ((name, item) for name, item in functions_of(text) if not is_compiled(item))
    return [name for name, item in found if parameter_count(item) > MOST_PARAMETERS]


@functools.cache
def sources() -> tuple[tuple[str, str], ...]:
    """Every file of the four packages: its path, and its text."""
    paths = (path for package in MAY_IMPORT for path in files_of(package))
    return tuple((path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)


def test_no_function_takes_more_than_a_few_parameters() -> None:
    """What travels together is one value."""
    found = {f"{path} {name}" for path, text in sources() for name in with_many_parameters(text)}

    assert found - MANY_PARAMETERS.keys() == set()


def test_no_file_is_long() -> None:
    assert [path for path, text in sources() if len(text.splitlines()) > MOST_LINES] == []


def crowded(root: Path, beside: tuple[str, ...] = ()) -> list[str]:
    """Folders with more than MOST_FILES files, `root` itself included; files named in `beside` and what Python compiled
    do not count."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    counts = {
        folder: sum(path.is_file() and path.name not in beside for path in folder.iterdir()) for folder in folders
    }
    return [folder.relative_to(root.parent).as_posix() for folder, count in counts.items() if count > MOST_FILES]


def test_no_folder_of_examples_or_tests_is_crowded() -> None:
    assert [*crowded(ROOT / "examples"), *crowded(ROOT / "tests", EVERY_PACKAGES)] == []


def test_a_planted_crowded_folder_is_found(tmp_path: Path) -> None:
    for folder, count in (("full", MOST_FILES), ("full/crowded", MOST_FILES + 1), ("full/__pycache__", MOST_FILES + 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.json").touch()

    assert crowded(tmp_path / "full") == ["full/crowded"]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function beside its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def with_long_bodies(text: str, most: int) -> list[str]:
    """Names of a file's functions whose bodies have more than so many lines."""
    found = ((name, item) for name, item in functions_of(text) if not is_compiled(item))
    return [name for name, item in found if body_lines(item) > most]


def test_no_function_is_long() -> None:
    most = {path: MOST_KERNEL_LINES if path.startswith("cpu_kernels/") else MOST_BODY_LINES for path, _ in sources()}

    assert {path: long for path, text in sources() if (long := with_long_bodies(text, most[path]))} == {}


def test_a_planted_long_function_is_found() -> None:
    lines = "".join(f"        x{index} = {index}\n" for index in range(3))
    text = f'class A:\n    def few(self):\n        """Said\n        in two lines."""\n{lines}'
    text += f"    def many(self):\n{lines}        return x0\n"

    assert with_long_bodies(text, 3) == ["A.many"]


def test_a_planted_function_with_many_parameters_is_found() -> None:
    names = ", ".join(f"p{index}" for index in range(MOST_PARAMETERS))
    text = f"class A:\n    def few(self, {names}): pass\n    def many(self, {names}, *, more): pass\n"
    compiled = f"@triton.jit(do_not_specialize=[])\ndef kernel({names}, more): pass\n"

    assert with_many_parameters(text + compiled) == ["A.many"]


def fixtures(text: str) -> Iterator[tuple[str, str]]:
    """The fixtures of a test file: the name of each, and what it does."""
    for function in (item for _, item in functions_of(text)):
        if any("fixture" in ast.unparse(mark) for mark in function.decorator_list):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            yield function.name, "\n".join(map(ast.unparse, body))


def test_a_fixture_exists_once() -> None:
    """What two files need stands in their folder's conftest."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for fixture in fixtures(path.read_text()):
            found.setdefault(fixture, []).append(path.relative_to(ROOT).as_posix())

    assert {name: paths for (name, _), paths in found.items() if len(paths) > 1} == {}


def test_a_planted_fixture_that_stands_twice_is_found() -> None:
    text = '@pytest.fixture(scope="module")\ndef made(path):\n    """Made."""\n    return open(path)\n'

    assert list(fixtures(text)) == [("made", "return open(path)")]
