"""What this machine offers, what is in the way, and what to do about it: the `doctor` command.

A report is a list of findings, each with a verdict: `ok`, `note` (works, could be better) or `problem` (something will
not run). Files of /proc and /sys are read below a `root` folder that tests replace. Nothing is changed, and nothing
fails because a source of information is missing: an unknown value is said to be unknown.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cpu_kernels.team.cgroups import cpu_quota, memory_limit_bytes, read_text
from cpu_kernels.team.kept_files import why_not_writable
from hetero_attn.tools.findings import GIB, Finding, Report, gib
from hetero_attn.tools.gpu_findings import gpus

REQUIRED = (
    "torch",
    "numba",
    "llvmlite",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "tqdm",
    "scipy",
    "psutil",
)
OPTIONAL = {"triton": "GPU kernels", "nvidia-ml-py": "GPU details in this report", "matplotlib": "plots"}
NAMED_FEATURES = ("avx2", "fma", "avxvnni", "avx512f", "avx512vnni", "avx512bf16", "amx-tile", "neon", "dotprod")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
LEAST_FREE_DISK_BYTES = 5 * GIB


def examine(root: Path = Path("/")) -> Report:
    """Look at everything. root: the folder that holds proc and sys. Never raises for what it cannot find."""
    sections = (versions(), processor(root), memory(root), gpus(), host_memory_settings(root), caches(), thread_pools())
    return Report(tuple(finding for section in sections for finding in section))


def versions() -> Iterator[Finding]:
    """Python and the packages; a required one that is missing is a problem."""
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "hetero-attn", _version("hetero-attn") or "not installed, running from its sources")
    for name in REQUIRED:
        found = _version(name)
        if found:
            yield Finding("versions", name, found)
        else:
            yield Finding("versions", name, "missing", "problem", f"pip install {name}")
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        yield Finding("versions", name, found or f"not installed (only for {purpose})")


def processor(root: Path) -> Iterator[Finding]:
    """CPU model, cores that this process may use, instruction sets and the kernel path they lead to."""
    from cpu_kernels.team.topology import physical_cpus
    from cpu_kernels.vectors.isa import available, host_features
    from hetero_attn.planning.profiles import lane_threads

    yield Finding("cpu", "model", _cpu_model(root))
    cores, usable = physical_cpus(), _usable_cpus()
    yield Finding("cpu", "cores", f"{len(cores)} physical usable here; {usable} of {os.cpu_count()} logical")
    yield Finding("cpu", "CPU lane threads", str(lane_threads()))
    quota = cpu_quota(root)
    if quota is not None and quota < usable:
        yield Finding(
            "cpu",
            "cgroup quota",
            f"{quota:g} CPUs",
            "note",
            f"more than {max(1, int(quota))} CPU lane threads would wait for each other",
        )
    features = host_features()
    named = [name for name in NAMED_FEATURES if name in features]
    yield Finding("cpu", "instruction sets", " ".join(named) or "none of those the kernels look for")
    path = available(features)[0]
    if path == "portable":
        yield Finding("cpu", "kernel path", path, "note", "no known vector unit: the CPU lane is correct but slow")
    else:
        yield Finding("cpu", "kernel path", path)


def memory(root: Path) -> Iterator[Finding]:
    """Host memory, swap, and the limit of the control group that this process is in."""
    import psutil

    host, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield Finding("memory", "host", f"{gib(host.available)} available of {gib(host.total)}")
    limit = memory_limit_bytes(root)
    if limit is not None and limit < host.total:
        yield Finding(
            "memory",
            "cgroup limit",
            gib(limit),
            "note",
            f"weights and DRAM-side cache must fit in {gib(limit)}, not in what the machine has",
        )
    else:
        yield Finding("memory", "cgroup limit", "none below the host's memory")
    if swap.used > GIB:
        yield Finding("memory", "swap in use", gib(swap.used), "note", "paging stalls every lane: free some memory")


def host_memory_settings(root: Path) -> Iterator[Finding]:
    """Pinned memory for copies and huge pages for the CPU lane."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else gib(soft)
    yield Finding("settings", "locked memory limit", f"{locked} (what the CUDA driver locks is tried under gpu)")
    setting = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.partition("[")[2].partition("]")[0] or "unknown"
    if chosen == "never":
        yield Finding(
            "settings",
            "transparent huge pages",
            chosen,
            "note",
            "the CPU lane reads weights faster with them: set them to madvise or always",
        )
    else:
        yield Finding("settings", "transparent huge pages", chosen)


def caches() -> Iterator[Finding]:
    """Where compiled kernels, the machine's profile and downloaded checkpoints are, and whether there is room."""
    yield _kernel_cache()
    yield _profile()
    from huggingface_hub.constants import HF_HUB_CACHE

    hub = Path(HF_HUB_CACHE)
    existing = next((folder for folder in (hub, *hub.parents) if os.path.exists(folder)), Path.cwd())
    free = shutil.disk_usage(existing).free
    verdict, advice = "ok", ""
    if free < LEAST_FREE_DISK_BYTES:
        verdict, advice = "note", "hub downloads may not fit; HF_HOME names another folder"
    yield Finding("caches", "hub checkpoints", f"{hub} ({gib(free)} free)", verdict, advice)


def thread_pools() -> Iterator[Finding]:
    """How many threads each library would start, and the variables that change it."""
    usable = _usable_cpus()
    try:
        import numba
        import torch

        yield Finding("threads", "torch", str(torch.get_num_threads()))
        yield Finding("threads", "numba", str(numba.config.NUMBA_NUM_THREADS))
    except ImportError:
        yield Finding("threads", "torch and numba", "unknown, they cannot be imported")
    for name in THREAD_VARIABLES:
        value = os.environ.get(name)
        if value is not None and value.isdigit() and int(value) > usable:
            yield Finding("threads", name, value, "note", f"only {usable} CPUs are usable here; unset it or lower it")
        elif value is not None:
            yield Finding("threads", name, value)


def _kernel_cache() -> Finding:
    from cpu_kernels.team.store import default_cache_dir

    folder = default_cache_dir()
    if folder is None:
        return _nothing_kept("compiled kernels", "none, there is no home folder")
    try:
        if not folder.exists():
            home = next(parent for parent in folder.parents if parent.exists())
            if not (home.is_dir() and os.access(home, os.W_OK)):
                return _nothing_kept("compiled kernels", f"{folder} ({home} is no folder that can be written)")
            return Finding("caches", "compiled kernels", f"{folder} (nothing compiled yet)")
        sizes = [kernel.stat().st_size for kernel in folder.glob("*/*.o")]
    except OSError as error:
        return _nothing_kept("compiled kernels", f"{folder} ({error.strerror})")
    text = f"{folder} ({len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB)"
    if reason := why_not_writable(folder / "kernel"):
        return _nothing_kept("compiled kernels", f"{text}, {reason}")
    return Finding("caches", "compiled kernels", text)


def _nothing_kept(name: str, text: str) -> Finding:
    advice = "kernels that are not there yet are compiled at every start; XDG_CACHE_HOME names another folder"
    return Finding("caches", name, text, "note", advice)


def _profile() -> Finding:
    try:
        from hetero_attn.planning.profiles import is_kept, profile_path, stored_profile
    except ImportError:
        return Finding("caches", "machine profile", "unknown, its packages cannot be imported")
    if stored_profile() is not None:
        return Finding("caches", "machine profile", str(profile_path()))
    state = "stale or damaged" if is_kept() else "none"
    return Finding(
        "caches",
        "machine profile",
        state,
        "note",
        "plans use a generic machine's rates; `hetero-attn profile` measures this one",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model(root: Path) -> str:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
