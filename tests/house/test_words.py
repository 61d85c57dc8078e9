"""Words of docs/words.md that once meant several things stand, in names of the code, only where they mean the one."""

import ast
import re

import pytest

from tests.support.suite.syntax import MAY_IMPORT, ROOT, sources, tree_of

LIBRARY = {"groupby", "TyperGroup"}
METHODS = {"group", "groups"}  # of a match of a regular expression
# Where `group` is the field's word for the experts that a router keeps or leaves out together.
ROUTING = (
    "cpu_kernels/small/route",
    "hetero_attn/models/experts.py",
    "hetero_attn/spec/experts_config.py",
    "hetero_attn/spec/families/mixtures/",
)
OF_EXPERTS = {"group", "groups", "kept_groups", "keep_groups"}
# Where no name with the word may stand, as beginnings of paths, because there it would mean what it no longer does; and
# names that may stand there all the same.
NOT_IN = {
    "group": (  # heads, layers, buffers
        (
            "cpu_kernels/small/",
            "cpu_kernels/team/",
            "gpu_kernels/attention/",
            "gpu_kernels/elementwise.py",
            "gpu_kernels/rope.py",
            "hetero_attn/cache/",
            "hetero_attn/devices/",
            "hetero_attn/engine/",
            "hetero_attn/lanes/",
            "hetero_attn/models/",
            "hetero_attn/ops/",
            "hetero_attn/spec/",
            "placement/cost/",
            "placement/policy/",
            "placement/solve/",
        ),
        {"GROUP_INPUTS", "group_inputs", "cgroups"},  # of a weight's format; the system's word
    ),
    "layout": (("hetero_attn/engine/", "hetero_attn/ops/", "placement/"), {"tight_layout"}),  # units over layers, rows
    "slot": (  # sequences, buffers of a ring, items of work
        (
            "cpu_kernels/attention/decode_kernel.py",
            "cpu_kernels/linear/",
            "cpu_kernels/team/",
            "hetero_attn/cache/cache.py",
            "hetero_attn/cache/pool.py",
            "hetero_attn/cache/prefix_tree.py",
            "hetero_attn/cache/states.py",
            "hetero_attn/devices/copy_ahead.py",
            "hetero_attn/lanes/",
            "hetero_attn/models/",
            "hetero_attn/spec/",
            "placement/cost/",
            "placement/plan/",
            "placement/policy/",
            "placement/solve/",
        ),
        {"_free_slots"},  # of the cache, in the planner
    ),
}


def words_of(name: str) -> set[str]:
    """The words of a name, in lower case and singular."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)
    return {part.lower().removesuffix("s") if len(part) > 3 else part.lower() for part in parts}


def names_in(tree: ast.AST) -> set[str]:
    """Every name that a module defines or uses."""
    found, nodes = set(), list(ast.walk(tree))
    methods = {node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    for node in set(nodes) - {item for item in methods if item.attr in METHODS}:
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return {name for name in found if not name.startswith("__")}


def strays(path: str, tree: ast.AST, word: str) -> list[str]:
    """Names of a module with the word, where that has no business."""
    places, exempt = NOT_IN[word]
    if not path.startswith(places):
        return []
    names = names_in(tree) - LIBRARY - exempt - (OF_EXPERTS if path.startswith(ROUTING) else set())
    return sorted(
        name for name in names if word in words_of(name) and not re.search("(staging|expert)_?slot", name.lower())
    )


@pytest.mark.parametrize("word", NOT_IN)
def test_a_word_does_not_stand_where_it_meant_something_else(word):
    found = {}
    for path in (path for package in MAY_IMPORT for path in sources(package)):
        relative = path.relative_to(ROOT).as_posix()
        if names := strays(relative, tree_of(path), word):
            found[relative] = names

    assert found == {}


@pytest.mark.parametrize(
    ("path", "text", "word", "expected"),
    [
        (
            "placement/cost/model.py",
            "cost.gpu_s_per_group = first_groups",
            "group",
            ["first_groups", "gpu_s_per_group"],
        ),
        ("hetero_attn/cache/pool.py", "class LayerGroup:\n    def end(self, slot): pass", "group", ["LayerGroup"]),
        ("hetero_attn/cache/pool.py", "class LayerGroup:\n    def end(self, slot): pass", "slot", ["slot"]),
        ("placement/solve/search.py", "staging_slots = self.slots", "slot", ["slots"]),
        ("hetero_attn/spec/config.py", "found.group(1); fields.grouped", "group", []),
        ("cpu_kernels/linear/pack.py", "group = layout.size", "group", []),
        ("cpu_kernels/small/route.py", "groups = kv_groups", "group", ["kv_groups"]),
        ("hetero_attn/ops/step.py", "rows = _Layout(entries)", "layout", ["_Layout"]),
    ],
)
def test_a_stray_word_is_found(path, text, word, expected):
    assert expected == strays(path, ast.parse(text), word)


def test_the_table_has_every_word_that_is_held():
    page = (ROOT / "docs" / "words.md").read_text()

    assert all(f"| {word} |" in page for word in NOT_IN)
