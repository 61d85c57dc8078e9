"""The shape of the code base: who may import whom, what is documented, what every op is called, what a start costs.

A folder of a package is a floor: it imports only floors below it. Imports are read from the source with `ast`, so that
one written inside a function, or for a type only, counts as well.
"""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cpu_kernels": set(),
    "gpu_kernels": set(),
    "placement": set(),
    "hetero_attn": {"cpu_kernels", "gpu_kernels", "placement"},
}
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
MOST_PARAMETERS = 6  # of an op
OPS = (
    "linear",
    "rms_norm",
    "copy_rows",
    "layer_norm",
    "silu_mul",
    "gelu_mul",
    "gelu",
    "gather_columns",
    "route",
    "expert_linear",
    "combine",
    "scale_rows",
    "add_expert_bias",
    "sigmoid_mul",
    "clamped_silu_mul",
    "norm_heads",
    "rope_append",
    "decode_attention",
    "prefill_attention",
    "add_sinks",
    "merge",
)
SLOW_TO_IMPORT = ("torch", "transformers", "scipy", "matplotlib", "numba", "starlette", "uvicorn")


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


def imported_names(path: Path, tree: ast.AST, modules: Collection[str] = ()) -> set[str]:
    """Dotted names of what the import statements in `tree` load, relative ones resolved against `path`.

    `from package import name` loads the module `package.name` where that is one of `modules`, else `package`.
    """
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(tree):
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


def public_definitions(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes that a reader may use, methods of public classes included."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append(node)
            found += public_definitions(node) if isinstance(node, ast.ClassDef) else []
    return found


def folder_of(module: str) -> str:
    """The folder of a module, as a dotted name."""
    return module.rpartition(".")[0]


@functools.cache
def names_others_import() -> set[tuple[str, str]]:
    """(module, name) of what code of another folder, of another package or of an example imports by name."""
    found = set()
    for path in (path for root in (*MAY_IMPORT, "examples") for path in sources(root)):
        here = folder_of(module_name(path))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and not node.level and folder_of(node.module) != here:
                found |= {(node.module, alias.name) for alias in node.names}
    return found


@functools.cache
def protocol_methods() -> set[str]:
    """Names of the methods that protocols declare and describe: an implementation inherits their words."""
    trees = [tree_of(path) for package in MAY_IMPORT for path in sources(package)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if any(ast.unparse(base).startswith("Protocol") for base in node.bases)]
    return {item.name for node in protocols for item in public_definitions(node) if says_something(item)}


def says_something(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a docstring is more than a word or two."""
    return len((ast.get_docstring(node) or "").split()) > 2


def undocumented(path: Path, tree: ast.Module, called: Collection[str], inherited: Collection[str]) -> list[str]:
    """What of a module lacks a useful docstring: itself, and of the definitions named in `called` those with their
    methods that are not `inherited`."""
    found = [] if says_something(tree) else [f"{path.relative_to(ROOT)}:1"]
    for node in public_definitions(tree):
        if node in tree.body and node.name in called:
            methods = public_definitions(node) if isinstance(node, ast.ClassDef) else []
            bare = [item for item in (node, *methods) if item.name not in inherited and not says_something(item)]
            found += [f"{path.relative_to(ROOT)}:{item.lineno} {item.name}" for item in bare]
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_what_others_call_has_a_useful_docstring(package: str) -> None:
    """What a folder keeps to itself needs none where its name says it."""
    imported, inherited = names_others_import(), protocol_methods()
    bare = []
    for path in sources(package):
        called = {name for module, name in imported if module == module_name(path)}
        bare += undocumented(path, tree_of(path), called, inherited)

    assert bare == []


def test_a_bare_definition_that_others_call_is_found() -> None:
    text = '"""A module of two."""\n\n\ndef own():\n    pass\n\n\nclass Called:\n    """One that is called."""\n\n    def go(self):\n        """Go."""\n'
    path = ROOT / "placement" / "imagined.py"

    assert undocumented(path, ast.parse(text), {"Called"}, set()) == ["placement/imagined.py:11 go"]
    assert undocumented(path, ast.parse(text), {"Called"}, {"go"}) == []
    assert undocumented(path, ast.parse(text), {"own"}, set()) == ["placement/imagined.py:4 own"]


def parameters(function: object) -> list[tuple[str, object, object]]:
    """Name, kind and default of every parameter; annotations may differ between implementations."""
    return [(item.name, item.kind, item.default) for item in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("op", OPS)
def test_op_has_one_signature_on_every_lane(op: str) -> None:
    reference = getattr(importlib.import_module("gpu_kernels.reference"), op)
    triton_op = getattr(importlib.import_module("gpu_kernels"), op)
    with importlib.import_module("cpu_kernels").CpuKernels(num_threads=1) as kernels:
        cpu_op = getattr(kernels, op)
        promised = parameters(getattr(importlib.import_module("cpu_kernels.contract").Ops, op))

        assert promised[0][0] == "self" and promised[1:] == parameters(reference)
        assert parameters(cpu_op) == parameters(reference)
    assert parameters(triton_op) == parameters(reference)
    assert len(parameters(reference)) <= MOST_PARAMETERS


def sentences(text: str) -> set[str]:
    """The sentences of a docstring, of more than a few words, however their lines are broken."""
    whole = " ".join(text.replace("`", "").split())
    return {part for part in re.split(r"(?<=[.:;]) ", whole) if len(part.split()) > 4}


def said_again(op: object, words: str) -> set[str]:
    """What of an op's words in the contract `words` say too: sentences, and what its arguments are."""
    arguments = {f"{name}:" for name, *_ in parameters(op)[1:]}
    return (sentences(inspect.getdoc(op)) & sentences(words)) | (arguments & set(words.split()))


def test_what_an_op_does_is_said_once() -> None:
    """Shapes, dtypes and what is written stand in the contract; an implementation adds only what is its own."""
    members = inspect.getmembers(importlib.import_module("cpu_kernels.contract").Ops, inspect.isfunction)
    ops = {name: op for name, op in members if not name.startswith("_")}
    contract, repeated = ROOT / "cpu_kernels" / "contract.py", []
    for path in (path for package in MAY_IMPORT for path in sources(package) if path != contract):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.name in ops:
                found = said_again(ops[node.name], ast.get_docstring(node) or "")
                repeated += [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {part}" for part in sorted(found)]

    assert ops.keys() >= set(OPS) and all(len(inspect.getdoc(op).split()) > 8 for op in ops.values()) and repeated == []


def test_words_of_an_op_said_again_are_found() -> None:
    op = importlib.import_module("cpu_kernels.contract").Ops.merge
    text = inspect.getdoc(op)

    assert said_again(op, text) == sentences(text)
    assert said_again(op, "Of tiles. partials: a list of them") == {"partials:"}
    assert said_again(op, "Partials must be contiguous.") == set()


def test_command_line_starts_without_heavy_packages() -> None:
    code = f"import sys, hetero_attn.cli; print([name for name in {SLOW_TO_IMPORT!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (run.stderr, run.stdout) == ("", "[]\n")


@pytest.mark.parametrize("driver", ["CudaDriver", "EmulatedDriver"])
def test_drivers_offer_what_the_protocol_says(driver: str) -> None:
    devices, protocol = importlib.import_module("hetero_attn.devices"), "hetero_attn.devices.protocols"
    promised = importlib.import_module(protocol).Driver
    for name, call in inspect.getmembers(promised, inspect.isfunction):
        if not name.startswith("_"):
            assert parameters(getattr(getattr(devices, driver), name)) == parameters(call), name


@pytest.mark.parametrize("order", ["handover.InOrder", "handover.EventHandover", "flag_handover.FlagHandover"])
def test_orders_between_the_lanes_offer_what_the_protocol_says(order: str) -> None:
    module, name = order.split(".")
    lanes = "hetero_attn.lanes."
    promised = importlib.import_module(lanes + "handover").Handover
    for method, call in inspect.getmembers(promised, inspect.isfunction):
        if not method.startswith("_"):
            assert parameters(getattr(getattr(importlib.import_module(lanes + module), name), method)) == parameters(
                call
            ), method
