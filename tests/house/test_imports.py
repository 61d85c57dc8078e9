"""The shape of the code base: who may import whom, how long chains are, what a start costs.

A folder of a package is a floor: it imports only floors below it. Imports are read from the source with `ast`, so that
one written inside a function, or for a type only, counts as well.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.suite.syntax import MAY_IMPORT, ROOT, module_name, sources, statements_of, tree_of

DESCRIPTION_OF_BYTES = "cpu_kernels.formats"
SHARED = (DESCRIPTION_OF_BYTES, "cpu_kernels.contract")  # the parts of cpu_kernels that every package may import
PROFILERS = "placement.profilers"  # the one part of placement that may import the kernels, to time them
# Top to bottom: a folder, or a file beside the folders, imports only what stands after it. "" is the package's face.
FLOORS = {
    "hetero_attn": (
        "__main__",
        "cli",
        "server",
        "",
        "tools",
        "llm",
        "serving",
        "speculation",
        "engine",
        "planning",
        "checkpoints",
        "models",
        "ops",
        "lanes",
        "cache",
        "devices",
        "spec",
        "errors",
    ),
    "placement": (
        "",
        "explain",
        "plots",
        "adapt",
        "drafted",
        "profilers",
        "solve",
        "program",
        "cost",
        "policy",
        "machine",
        "plan",
    ),
    "cpu_kernels": (
        "",
        "kernels",
        "ahead",
        "attention",
        "linear",
        "delta",
        "small",
        "team",
        "checks",
        "vectors",
        "contract",
        "formats",
    ),
}
LONGEST_CHAIN = {"hetero_attn": 14, "placement": 6, "cpu_kernels": 6}
MOST_MODULES = 14  # in one folder
SLOW_TO_IMPORT = ("torch", "transformers", "scipy", "matplotlib", "numba", "starlette", "uvicorn", "rich.console")


def imported_names(path: Path, tree: ast.AST, modules: Collection[str] = ()) -> set[str]:
    """Dotted names of what the import statements in `tree` load, relative ones resolved against `path`.

    `from package import name` loads the module `package.name` where that is one of `modules`, else `package`.
    """
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in statements_of(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(parents + ([node.module] if node.module else []))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else base for name in inner}
    return names


def tracked_text_files() -> list[Path]:
    """Files of the repository that are text: what git tracks, or everything outside build folders in an archive."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".venv", "__pycache__", "build"} & set(path.parts)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    for path in sources(package):
        allowed = MAY_IMPORT[package] | {package}
        if module_name(path).startswith(PROFILERS):
            allowed = allowed | {"cpu_kernels", "gpu_kernels"}
        names = imported_names(path, tree_of(path))
        used = {name.partition(".")[0] for name in names if not any(is_inside(name, part) for part in SHARED)}

        assert used & set(MAY_IMPORT) <= allowed, f"{path.relative_to(ROOT)} imports a package it must not know"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_nothing_below_tests_and_examples_imports_them(package: str) -> None:
    for path in sources(package):
        used = {name.partition(".")[0] for name in imported_names(path, tree_of(path))}

        assert not used & {"tests", "examples", "conftest"}, path.relative_to(ROOT)


def is_inside(name: str, package: str) -> bool:
    """Whether a dotted name is of a package or of something in it."""
    return name == package or name.startswith(package + ".")


@functools.cache
def import_graph(package: str) -> dict[str, set[str]]:
    """What each module of a package imports of that package, at import, in functions and for types."""
    files = {module_name(path): path for path in sources(package)}
    return {name: (imported_names(path, tree_of(path), files) & set(files)) - {name} for name, path in files.items()}


def floor_of(module: str) -> str:
    """The folder of a package, or the file beside its folders, that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def floor_graph(package: str) -> dict[str, dict[str, str]]:
    """By floor, the floors that it imports, each with an example."""
    graph: dict[str, dict[str, str]] = {}
    for module, imported in import_graph(package).items():
        for name in imported:
            if floor_of(module) != floor_of(name):
                graph.setdefault(floor_of(module), {})[floor_of(name)] = f"{module} imports {name}"
    return graph


def longest_chain(graph: dict[str, dict[str, str]], start: str) -> tuple[str, ...]:
    """The longest way down from a floor."""
    return (start, *max((longest_chain(graph, name) for name in graph.get(start, ())), key=len, default=()))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_circle_of_imports_of_any_kind(package: str) -> None:
    try:
        list(TopologicalSorter(import_graph(package)).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", FLOORS)
def test_folders_import_only_what_is_below_them(package: str) -> None:
    order, graph = FLOORS[package], floor_graph(package)
    floors = {floor_of(module_name(path)) for path in sources(package)}

    assert floors == set(order), "FLOORS lists every folder and every file beside the folders"
    assert [
        example
        for upper, imports in graph.items()
        for lower, example in imports.items()
        if order.index(upper) > order.index(lower)
    ] == []


@pytest.mark.parametrize("package", FLOORS)
def test_the_longest_chain_of_folders_stays_short(package: str) -> None:
    graph = floor_graph(package)
    longest = max((longest_chain(graph, floor) for floor in FLOORS[package]), key=len)

    assert len(longest) <= LONGEST_CHAIN[package], " -> ".join(longest)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_folder_says_what_is_in_it_and_holds_few_modules(package: str) -> None:
    for folder in {path.parent for path in sources(package)}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]

        assert len(modules) <= MOST_MODULES, folder.relative_to(ROOT)
        assert (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").count(".") >= 1, folder


def test_the_description_of_bytes_needs_nothing_heavy() -> None:
    """A planner may read it on a machine that has no compiler and no torch."""
    code = (
        "import sys, pkgutil, importlib, cpu_kernels.formats as formats\n"
        "for module in pkgutil.iter_modules(formats.__path__, 'cpu_kernels.formats.'): importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'numba', 'llvmlite', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (run.stderr, run.stdout) == ("", "[]\n")


def test_import_reader_sees_what_it_must() -> None:
    text = "from . import a, x\nfrom .b import c\nimport d.e\nif TYPE_CHECKING:\n    import f\ndef g():\n    import h\n"
    path, tree = ROOT / "placement" / "imagined.py", ast.parse(text)

    assert imported_names(path, tree, {"placement.a"}) == {"placement", "placement.a", "placement.b", "d.e", "f", "h"}


def machine_patterns() -> list[re.Pattern[str]]:
    """What must not be in a tracked file: one machine's folders and addresses. Assembled, so this file stays clean."""
    folders = "|".join(["work", "tmp", "root", "home", "Users", "mnt", "scratch"])
    private_names = "|".join(["internal", "corp", "lan", "intranet"])
    return [
        re.compile(rf"(?<![\w.~/-])/(?:{folders})/[\w.-]"),
        re.compile(rf"\b[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:{private_names})(?![\w.(])(?=[:/\s\"'])"),
        re.compile(r"https?://\d+\.\d+\.\d+\.\d+"),
    ]


QUOTED_TEXT = ROOT / "examples" / "tiny" / "heldout.txt"  # documentation of CPython, with the paths of its examples


def test_no_path_or_host_of_one_machine_is_tracked() -> None:
    found = []
    for path in set(tracked_text_files()) - {QUOTED_TEXT}:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}" for rule in machine_patterns() if rule.search(line)]

    assert found == []


@pytest.mark.parametrize("folder", ["tmp", "home"])
def test_machine_patterns_catch_a_planted_path(folder: str) -> None:
    line = "x = open('" + "/" + folder + "/someone/model')"

    assert any(rule.search(line) for rule in machine_patterns())


def test_command_line_starts_without_heavy_packages() -> None:
    code = f"import sys, hetero_attn.cli; print([name for name in {SLOW_TO_IMPORT!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (run.stderr, run.stdout) == ("", "[]\n")
