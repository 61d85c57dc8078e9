"""A script of `examples/` run in this process, for tests of what it does and not of its process: nothing is imported
again."""

import io
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def run_script(path: Path, *arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    """What `python PATH ARGUMENTS` with `lines` as its standard input would end with; all is as it was afterwards."""
    command, out, errors = [str(path), *map(str, arguments)], io.StringIO(), io.StringIO()
    threads, modules = torch.get_num_threads(), set(sys.modules)
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(sys, "stdin", io.StringIO(lines)),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            errors.write("" if isinstance(end.code, int | None) else str(end.code))
        except Exception:
            traceback.print_exc()
            code = 1
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXAMPLES)):
            del sys.modules[name]
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())
