"""The store of compiled kernels: what is stale, damaged or not ours is made again, and nothing in it is trusted."""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "cpu_kernels"
FIRST_NUMBER = r"""
import ctypes, sys
from pathlib import Path
from cpu_kernels.cache import KernelStore, as_function

compiled = []
store = KernelStore(Path(sys.argv[1]), compiled.append)
memory = (ctypes.c_int64 * 1)()
as_function(store.address("corner.number_kernel", "number"))(b"\0" * 8, None, ctypes.addressof(memory), 0)
print(memory[0], *compiled)
"""
NUMBER_KERNEL = """
from ..scalar import store_i64


def number():
    def kernel(arguments, thread):
        store_i64(thread + {number}, arguments)

    return kernel
"""


def test_an_edited_kernel_in_a_subfolder_is_built_again(tmp_path):
    """Only the files beside the store were hashed: an edited kernel below them would have run as it was before."""
    shutil.copytree(PACKAGE, tmp_path / "cpu_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    corner = tmp_path / "cpu_kernels" / "corner"
    corner.mkdir()
    (corner / "__init__.py").touch()

    def run(number: int) -> list[str]:
        (corner / "number_kernel.py").write_text(NUMBER_KERNEL.format(number=number))
        command = [sys.executable, "-B", "-c", FIRST_NUMBER, str(tmp_path / "cache")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert [run(3), run(3), run(4)] == [["3", "number"], ["3"], ["4", "number"]]
