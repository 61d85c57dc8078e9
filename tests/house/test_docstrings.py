"""What others call says what it does, once, and every op is called alike on every lane."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.support.kernels.contract_ops import OPS
from tests.support.suite.syntax import MAY_IMPORT, ROOT, module_name, sources, statements_of, tree_of

MOST_PARAMETERS = 6  # of an op


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
def names_others_import() -> dict[str, set[str]]:
    """By module, the names that code of another folder, of another package or of an example imports of it."""
    found: dict[str, set[str]] = {}
    for path in (path for root in (*MAY_IMPORT, "examples") for path in sources(root)):
        here = folder_of(module_name(path))
        for node in statements_of(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and not node.level and folder_of(node.module) != here:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
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
        called = imported.get(module_name(path), set())
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
    promised = importlib.import_module("cpu_kernels.contract").Ops
    ops = {name: getattr(promised, name) for name in OPS}
    contract, repeated = ROOT / "cpu_kernels" / "contract.py", []
    for path in (path for package in MAY_IMPORT for path in sources(package) if path != contract):
        for node in statements_of(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.name in ops:
                found = said_again(ops[node.name], ast.get_docstring(node) or "")
                repeated += [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {part}" for part in sorted(found)]

    assert all(len(inspect.getdoc(op).split()) > 8 for op in ops.values()) and repeated == []


def test_words_of_an_op_said_again_are_found() -> None:
    op = importlib.import_module("cpu_kernels.contract").Ops.merge
    text = inspect.getdoc(op)

    assert said_again(op, text) == sentences(text)
    assert said_again(op, "Of tiles. partials: a list of them") == {"partials:"}
    assert said_again(op, "Partials must be contiguous.") == set()


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
