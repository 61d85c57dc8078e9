"""Compiled kernels: built by numba once, kept as object files, loaded without numba afterwards.

A kernel is a Python function void(arguments, thread) made by a factory in one of this package's *_kernel modules. The
first use compiles it (numba -> LLVM -> one object file) and stores the object; every later process only maps the
object, so a warm start imports neither numba nor the factories.

Trust: the directory is ours alone (0700, our uid, no symbolic link) or it is not used at all. Each entry carries a
SHA-256 of its content: a damaged entry is deleted and built again, never executed. The directory's name hashes the
package's source, the versions and the CPU, so no entry can be stale; entries are written under a temporary name and
renamed, so a reader never sees half of one.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from .isa import Isa

CHECKSUM_BYTES = 32
PACKAGE = __name__.partition(".")[0]


def default_cache_dir() -> Path:
    """Where compiled kernels are kept unless told otherwise: the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetero_attn" / "cpu_kernels"


def source_digest(package: Path) -> str:
    """A hash of the Python files of a package, those in its subfolders too, and of where in it each one lies."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.cache
def build_key() -> str:
    """Hash of everything that a compiled kernel depends on: source, versions, CPU; read once per process."""
    digest = hashlib.sha256(source_digest(Path(sys.modules[PACKAGE].__file__).parent).encode())
    versions = (sys.version, importlib.metadata.version("numba"), llvmlite.__version__, platform.machine())
    features = llvm.get_host_cpu_features().flatten() if platform.machine() else ""
    digest.update(repr((versions, llvm.get_host_cpu_name(), features)).encode())
    return digest.hexdigest()[:24]


def private_dir(path: Path) -> Path:
    """`path` made if missing and verified to be ours alone; a fresh temporary directory where that cannot be."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if stat.S_ISDIR(status.st_mode) and ours and not status.st_mode & 0o077 and os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hetero_attn_kernels_"))


class KernelStore:
    """Addresses of compiled kernels.

    cache_dir: parent of the private directory; on_compile(name): called before each compilation,
    which takes about a second. Not thread safe: the team's lock covers it. The store owns the machine code, so whoever
    runs a kernel keeps a reference to the store.
    """

    def __init__(self, cache_dir: Path | None = None, on_compile: Callable[[str], None] | None = None):
        self.directory = private_dir((cache_dir or default_cache_dir()) / build_key())
        self._on_compile = on_compile
        self._addresses: dict[tuple, int] = {}
        self._engine = None

    def address(self, module: str, factory: str, *parameters: Isa | int | str) -> int:
        """Entry point of the kernel that `cpu_kernels.<module>.<factory>(*parameters)` describes; `module` may be dotted."""
        key = (module, factory, *parameters)
        if key not in self._addresses:
            name = "_".join(str(part) for part in (factory, *parameters))
            self._addresses[key] = self._load(name) or self._build(module, factory, parameters, name)
        return self._addresses[key]

    def _load(self, name: str) -> int | None:
        """Map a stored object; None if there is none or it is damaged."""
        path = self.directory / f"{name}.o"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        body = content[CHECKSUM_BYTES:]
        if hashlib.sha256(body).digest() != content[:CHECKSUM_BYTES]:
            path.unlink(missing_ok=True)
            return None
        return self._map(name, body)

    def _map(self, name: str, code: bytes) -> int:
        if self._engine is None:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            target = llvm.Target.from_triple(llvm.get_process_triple())
            empty = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"')
            self._engine = llvm.create_mcjit_compiler(empty, target.create_target_machine())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return self._engine.get_function_address(name)

    def _build(self, module: str, factory: str, parameters: tuple, name: str) -> int:
        if self._on_compile is not None:
            self._on_compile(name)
        from .compiler import compile_object

        kernel = getattr(importlib.import_module(f"{PACKAGE}.{module}"), factory)(*parameters)
        code = compile_object(kernel, name)
        self._store(name, code)
        return self._map(name, code)

    def _store(self, name: str, code: bytes) -> None:
        """Write the entry under a temporary name and rename it; a full disk only costs the next start its speed."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as entry:
                entry.write(hashlib.sha256(code).digest() + code)
            os.replace(entry.name, self.directory / f"{name}.o")
        except OSError:
            Path(entry.name).unlink(missing_ok=True)


def as_function(address: int) -> Callable[[bytes, None, int, int], int]:
    """A ctypes function over a compiled kernel: (result buffer, None, arguments, thread); it releases the GIL."""
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
