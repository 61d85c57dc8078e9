"""Compiled kernels: built by numba once, kept as object files, loaded without numba afterwards.

A kernel is a Python function void(arguments, thread) made by a factory in one of this package's *_kernel modules. The
first use compiles it (numba -> LLVM -> one object file) and stores the object; every later process only maps the
object, so a warm start imports neither numba nor the factories.

Trust: an object is executed, so its file must be one that only this user or root can write, in such a folder
(kept_files.py). It begins with a SHA-256 over the build key, its name and its content, so that a damaged entry and one
that belongs to another kernel or build are known, and its form is checked before the loader sees it (object_file.py),
because the loader trusts what it is given. What fails is said in one line and built again, never executed. The
folder's name is the build key, a hash of the package's source, the versions and the CPU, so no entry can be stale. A
folder that can only be read is used as it is; where nothing can be kept, kernels are compiled at every start.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import platform
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from cpu_kernels.team.kept_files import (
    UnusableFileError,
    cache_home,
    check_folder,
    read_kept,
    remove_leftovers,
    why_not_writable,
    write_kept,
)
from cpu_kernels.team.object_file import ObjectError, check_object
from cpu_kernels.vectors.isa import Isa

CHECKSUM_BYTES = 32
MOST_OBJECT_BYTES = 16 << 20  # the largest has a few hundred thousand
PACKAGE = __name__.partition(".")[0]


def default_cache_dir() -> Path | None:
    """Where compiled kernels are kept unless told otherwise: in the user's cache folder, None where there is none."""
    home = cache_home()
    return None if home is None else home / "hetero_attn" / "cpu_kernels"


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


class KernelStore:
    """Addresses of compiled kernels.

    cache_dir: parent of the folder of this build; on_compile(name): called before each compilation,
    which takes about a second. `address` may be called by several threads, what else there is by one alone. The store
    owns the machine code, so whoever runs a kernel keeps a reference to the store.
    """

    def __init__(self, cache_dir: Path | None = None, on_compile: Callable[[str], None] | None = None):
        parent = self.parent = cache_dir or default_cache_dir()
        self.directory = None if parent is None else parent / build_key()
        self._said_not_kept = False
        self._on_compile = on_compile
        self._addresses: dict[tuple, int] = {}
        self._missing: list[tuple] | None = None
        self._engine = None
        self._lock = threading.RLock()  # of what finds and builds a kernel
        if self.directory is None:
            self._give_up("there is no home folder")
            return
        try:
            check_folder(self.directory)
            remove_leftovers(self.directory)
        except FileNotFoundError:
            pass
        except OSError as problem:
            self._give_up(
                f"{self.directory}: {problem if isinstance(problem, UnusableFileError) else problem.strerror}"
            )

    def address(self, module: str, factory: str, *parameters: Isa | int | str) -> int:
        """Entry point of the kernel that `cpu_kernels.<module>.<factory>(*parameters)` describes; `module` may be
        dotted."""
        key = (module, factory, *parameters)
        if key not in self._addresses:
            with self._lock:
                return self._found(key)
        return self._addresses[key]

    def _found(self, key: tuple) -> int:
        if key in self._addresses:  # another thread was sooner
            return self._addresses[key]
        module, factory, *parameters = key
        name = _name(factory, *parameters)
        address = self._load(name)
        if address is None and self._missing is not None:
            self._missing.append(key)
            return 0
        self._addresses[key] = address or self._build(module, factory, tuple(parameters), name)
        return self._addresses[key]

    def missing(self, work: Callable[[], object]) -> list[tuple]:
        """The kernels that `work` asks for and that are not there yet; for those `address` answers 0 meanwhile."""
        self._missing = []
        try:
            work()
            return list(dict.fromkeys(self._missing))
        finally:
            self._missing = None

    def keep_compiled(self, module: str, factory: str, *parameters: Isa | int | str) -> None:
        """Compile a kernel for other processes, without mapping it."""
        name = _name(factory, *parameters)
        self._store(name, self._compile(module, factory, parameters, name))

    @property
    def keeps(self) -> bool:
        """Whether what is compiled now can be kept for later starts and by other processes."""
        return self.directory is not None and not why_not_writable(self.directory / "any.o")

    def build(self, kernel: tuple) -> None:
        """Compile and map a kernel, (module, factory, *parameters), whatever is kept."""
        module, factory, *parameters = kernel
        self._addresses[kernel] = self._build(module, factory, tuple(parameters), _name(*kernel[1:]))

    def say(self, kernel: tuple) -> None:
        """Tell who wants to know that a kernel is being compiled."""
        if self._on_compile is not None:
            self._on_compile(_name(*kernel[1:]))

    def _load(self, name: str) -> int | None:
        """Map a stored object; None if there is none or it cannot be used, which is said."""
        if self.directory is None:
            return None
        path = self.directory / f"{name}.o"
        try:
            content = read_kept(path, MOST_OBJECT_BYTES)
            code = content[CHECKSUM_BYTES:]
            if content[:CHECKSUM_BYTES] != self._checksum(name, code):
                raise ObjectError("its checksum is wrong")
            if sys.platform == "linux":  # other systems have other forms of object
                self._loader()  # only then are the symbols of this process known
                check_object(code, name, platform.machine(), _has_symbol)
        except FileNotFoundError:
            return None
        except (UnusableFileError, ObjectError) as problem:
            warnings.warn(f"{path} is not used, {problem}: the kernel is compiled again", stacklevel=2)
            return None
        return self._map(name, code)

    @staticmethod
    def _checksum(name: str, code: bytes) -> bytes:
        return hashlib.sha256(f"{build_key()}\0{name}\0".encode() + code).digest()

    def _loader(self) -> llvm.ExecutionEngine:
        if self._engine is None:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            target = llvm.Target.from_triple(llvm.get_process_triple())
            empty = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"')
            self._engine = llvm.create_mcjit_compiler(empty, target.create_target_machine())
        return self._engine

    def _map(self, name: str, code: bytes) -> int:
        engine = self._loader()
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return engine.get_function_address(name)

    def _build(self, module: str, factory: str, parameters: tuple, name: str) -> int:
        code = self._compile(module, factory, parameters, name)
        self._store(name, code)
        return self._map(name, code)

    def _compile(self, module: str, factory: str, parameters: tuple, name: str) -> bytes:
        if self._on_compile is not None:
            self._on_compile(name)
        from cpu_kernels.vectors.compiler import compile_object

        kernel = getattr(importlib.import_module(f"{PACKAGE}.{module}"), factory)(*parameters)
        isa = next((part for part in parameters if isinstance(part, Isa)), None)
        return compile_object(kernel, name, isa)

    def _store(self, name: str, code: bytes) -> None:
        """Keep a compiled object; where that is not possible only the next start loses its speed."""
        if self.directory is None:
            return
        try:
            write_kept(self.directory / f"{name}.o", self._checksum(name, code) + code)
        except UnusableFileError as problem:
            if not self._said_not_kept:
                self._said_not_kept = True
                _note_not_kept(f"{self.directory}: {problem}")

    def _give_up(self, reason: str) -> None:
        self.directory = None
        _note_not_kept(reason)


def _name(factory: str, *parameters: Isa | int | str) -> str:
    return "_".join(str(part) for part in (factory, *parameters))


def _note_not_kept(reason: str) -> None:
    warnings.warn(
        f"compiled kernels are not kept ({reason}), so that every start compiles them again; "
        "XDG_CACHE_HOME names another folder",
        stacklevel=4,
    )


def _has_symbol(name: str) -> bool:
    """Whether the loader will find a function of this process by its name."""
    return bool(llvm.address_of_symbol(name))


def as_function(address: int) -> Callable[..., int]:
    """A ctypes function over a compiled kernel: (result buffer, None, arguments, thread); it releases the GIL."""
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
