"""What a user installs: one pure-Python wheel of four packages with their data, and one script that checks it all."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hetero_attn", "cpu_kernels", "gpu_kernels", "placement")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where the name to import is not the name to install.
DISTRIBUTION_OF = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "llvmlite": "numba", "triton": "torch"}


def normalized(name: str) -> str:
    """A distribution name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The distribution that a requirement line names."""
    return normalized(re.match(r"[\w.-]+", requirement).group())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is written into the checkout."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools} is here, and a wheel needs 77: install the extra test-tools")
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "--wheel-dir", "out", "."], cwd=copy, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = (copy / "out").glob("*.whl")
    return built


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"hetero_attn-{PROJECT['version']}-py3-none-any.whl"


def test_wheel_holds_every_source_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js") or path.name == "py.typed"
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert held == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert any(name.endswith(".yaml") for name in held)


def test_wheel_carries_the_license_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))

    assert any(name.endswith("LICENSE") for name in names)
    assert "hetero-attn = hetero_attn.cli:main" in archive.read(entry_points).decode()


def test_dependencies_are_ranges() -> None:
    pinned = [line for line in PROJECT["dependencies"] if re.search(r"==|<|~=|!=", line)]

    assert pinned == []


def test_every_imported_distribution_is_declared() -> None:
    extras = sum(PROJECT["optional-dependencies"].values(), [])
    declared = {requirement_name(line) for line in PROJECT["dependencies"] + extras}
    imported = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(PACKAGES) - set(sys.stdlib_module_names)

    assert {normalized(DISTRIBUTION_OF.get(name, name)) for name in foreign} <= declared


def test_changelog_names_the_version() -> None:
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_license_is_the_full_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()

    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_check_script_runs_the_tests_through_make() -> None:
    script = ROOT / ".ci" / "run"

    assert script.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert "make lint" in script.read_text() and "make test" in script.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_demo_and_test_set_up_the_same_environment() -> None:
    plan = {}
    for target in ("demo", "test"):
        command = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        plan[target] = run.stdout.rstrip().rpartition("\n")

    assert plan["test"][0].startswith(plan["demo"][0])
    more = [line for line in plan["test"][0].removeprefix(plan["demo"][0]).splitlines() if "pip" in line]
    assert len(more) == 1 and '".[clients]"' in more[0]  # the server's clients, for its tests alone
    assert plan["demo"][2].endswith("python examples/demo.py")
    assert "python -m pytest" in plan["test"][2]  # and how it shares the files out, where it can


def test_an_installed_wheel_runs_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """Nothing of the checkout is on the path: the wheel alone, beside the libraries that are here."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['hetero-attn', 'plan', "
        f"{str(ROOT / 'examples' / 'tiny')!r}, '--device', 'cpu', '--no-explain']\n"
        "import hetero_attn, placement, cpu_kernels\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (hetero_attn, placement, cpu_kernels))\n"
        "from hetero_attn.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("fits: ") and "\ntiny on cpu" in run.stdout
