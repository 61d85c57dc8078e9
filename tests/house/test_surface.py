"""What users write down: public names, parameters, options, exit codes, JSON and YAML keys stay as they are.

public_surface.json is the list, written down once. Names may be added; one that is gone or means something else fails
here. Who takes a name away on purpose takes it out of the list, too.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hetero_attn
from hetero_attn.cli import app
from hetero_attn.cli.errors import exit_code
from placement import HardwareProfile, policy_schema

HERE = Path(__file__).resolve().parent
TINY = str(HERE.parents[1] / "examples" / "tiny")
WRITTEN_DOWN = json.loads((HERE / "public_surface.json").read_text())
ON_CPU = ("--device", "cpu", "--threads", "1", "--context", "256")
COMMANDS = {
    "plan": ("plan", TINY, *ON_CPU, "--json"),
    "plan for a catalogue machine": (
        "plan",
        TINY,
        "--hardware",
        "rtx3060-ddr4",
        "--device",
        "cuda",
        "--context",
        "256",
        "--gpu-memory",
        "1GiB",
        "--json",
    ),
    "generate": ("generate", TINY, "-p", "Once", "-n", "2", *ON_CPU, "--json"),
    "verify": ("verify", TINY, "-p", "Once upon", *ON_CPU, "--json"),
    "bench": ("bench", TINY, "--prompt-tokens", "16", "--gen-tokens", "2", *ON_CPU, "--json"),
}


def names(package: str) -> list[str]:
    """Names that a package offers."""
    return sorted(importlib.import_module(package).__all__)


def parameters(function: Any) -> dict[str, str]:
    """Each parameter with its kind, and its default where that is a plain value."""
    found = {}
    for item in inspect.signature(function).parameters.values():
        plain = item.default is None or isinstance(item.default, (bool, int, float, str, tuple))
        default = repr(item.default) if plain else "has a default"
        found[item.name] = (
            item.kind.description if item.default is item.empty else f"{item.kind.description}, {default}"
        )
    return found


def members(kind: type) -> dict[str, Any]:
    """Public attributes of a class; of what can be called, its parameters."""
    found: dict[str, Any] = {} if issubclass(kind, Exception) else {"()": parameters(kind)}
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if not name.startswith("_"):
            function = getattr(member, "__func__", member)
            found[name] = parameters(function) if inspect.isfunction(function) else "value"
    return found


def api() -> dict[str, Any]:
    """Every public object of the package that users import."""
    offered = {name: getattr(hetero_attn, name) for name in names("hetero_attn")}
    return {name: members(item) if inspect.isclass(item) else parameters(item) for name, item in offered.items()}


def options() -> dict[str, list[str]]:
    """Arguments and options of every subcommand."""
    found = {}

    def walk(command: Any, name: str) -> None:
        found[name] = sorted(spelling for item in command.params for spelling in item.opts + item.secondary_opts)
        for inner, subcommand in getattr(command, "commands", {}).items():
            walk(subcommand, f"{name} {inner}")

    walk(typer.main.get_command(app), "hetero-attn")
    return found


def exit_codes() -> dict[str, int]:
    """The exit code of every error type that a user may meet."""
    errors = vars(importlib.import_module("hetero_attn.errors")).values()
    kinds = [kind for kind in errors if inspect.isclass(kind) and issubclass(kind, Exception)]
    kinds += [getattr(importlib.import_module("placement"), name) for name in ("BudgetError", "PolicyError")]
    return {kind.__name__: exit_code(kind.__new__(kind)) for kind in kinds}


def keys(value: Any, prefix: str = "") -> set[str]:
    """Paths of all keys in plain values; elements of one list are taken together."""
    if isinstance(value, dict):
        return {path for key, item in value.items() for path in {f"{prefix}/{key}"} | keys(item, f"{prefix}/{key}")}
    return set().union(*(keys(item, f"{prefix}/*") for item in value)) if isinstance(value, list) else set()


def printed(arguments: tuple[str, ...]) -> list[str]:
    """Key paths of what a subcommand prints as JSON."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return sorted(keys(json.loads(result.stdout)))


def surface() -> dict[str, Any]:
    """All of it, as it is now."""
    return {
        "packages": {package: names(package) for package in WRITTEN_DOWN["packages"]},
        "api": api(),
        "options": options(),
        "exit codes": exit_codes(),
        "policy keys": sorted(keys(policy_schema())),
        "profile keys": sorted(keys(HardwareProfile.named("h100-server").to_dict())),
        "json": {name: printed(arguments) for name, arguments in COMMANDS.items()},
    }


def missing(written: Any, now: Any, place: str = "") -> list[str]:
    """Where `now` lacks, or says otherwise, what was written down."""
    if isinstance(written, dict):
        if not isinstance(now, dict):
            return [f"{place}: {now!r}"]
        return [
            line
            for key, value in written.items()
            for line in (missing(value, now[key], f"{place}/{key}") if key in now else [f"{place}/{key} is gone"])
        ]
    if isinstance(written, list):
        return [f"{place}: {item!r} is gone" for item in written if item not in now]
    return [] if written == now else [f"{place}: was {written!r}, is {now!r}"]


def test_nothing_that_users_write_down_is_gone() -> None:
    assert missing(WRITTEN_DOWN, surface()) == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"a": {"b": "x"}, "c": ["1"]}, "/a/b: was 'y', is 'x'"),
        ({"a": {}, "c": ["1"]}, "/a/b is gone"),
        ({"a": {"b": "y"}, "c": []}, "/c: '1' is gone"),
    ],
)
def test_the_comparison_sees_what_is_gone(now: Any, line: str) -> None:
    written = {"a": {"b": "y"}, "c": ["1"]}

    assert missing(written, written | {"d": 1}) == [] and missing(written, now) == [line]
