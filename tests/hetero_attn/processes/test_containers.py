"""Whole commands where nothing can be kept: no home and no entry in the list of users, odd or full cache places."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from cpu_kernels.team import kept_files
from tests.support.processes.quick_python import quick_python

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "examples" / "tiny")
# A random user id without a passwd entry, as containers have it: the interpreter then finds no home folder.
AS_NOBODY_KNOWN = """
import json, os, pwd, sys
def unknown(*arguments):
    raise KeyError(f"uid not found: {arguments}")
pwd.getpwuid = pwd.getpwnam = unknown
from hetero_attn.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["hetero-attn", *arguments]
    try:
        main()
    except SystemExit as left:
        if left.code:
            raise
"""
PLACES = {
    "no home": {},
    "too long": {"XDG_CACHE_HOME": "/" + "x" * 3000},
    "below a file": {"XDG_CACHE_HOME": os.devnull},
}
GENERATE = ["generate", TINY, "-p", "def f(", "-n", "3", "--device", "cpu", "--context", "64"]
PLAN = ["plan", TINY, "--device", "cpu", "--no-explain"]
DOCTOR = ["doctor"]


@pytest.mark.parametrize(
    ("commands", "place"),
    [([GENERATE], "no home"), *(([PLAN, DOCTOR], place) for place in PLACES)],
    ids=["generate-no home", *(f"plan and doctor-{place}" for place in PLACES)],
)
def test_commands_work_where_nothing_can_be_kept(commands, place, tmp_path):
    """Each of these ended with a traceback; `profile` keeps by the same function, see test_damaged_profiles.py."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    settings = environment | PLACES[place] | {"TMPDIR": str(tmp_path)}
    if GENERATE in commands:  # without its kernels it would compile for a minute: test_kernel_store.py does without
        settings["XDG_CACHE_HOME"] = str(kept_files.cache_home())
    run = quick_python("-c", AS_NOBODY_KNOWN, json.dumps(commands))
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=settings, check=False)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (PLAN in commands) == ("fits: " in done.stdout) and (DOCTOR in commands) == ("verdict: " in done.stdout)
    assert not [name for name in os.listdir(tmp_path) if "hetero" in name]
