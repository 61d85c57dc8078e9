"""What a measured profile depends on, read from the system: a profile with another fingerprint is stale or foreign."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from pathlib import Path

from placement.machine.gpu_here import has_gpu

SYSTEM = Path("/")
MEASUREMENTS = 3  # what a profile holds; one that was kept by a profiler that measured less is stale


def machine_fingerprint(cores: int, root: Path = SYSTEM) -> tuple[tuple[str, str], ...]:
    """Sorted (key, value) pairs of CPU, cores that may be used, GPU, driver, PCIe link, versions, kernels and what is
    measured.

    cores: physical cores that the thread sweep may try. root: of the system's own files.
    """
    fields = {
        "cpu": cpu_name(root),
        "cores": str(cores),
        "machine": platform.machine(),
        "system": platform.system(),
        "gpu": "none",
        "measurements": str(MEASUREMENTS),
        **_installed(),
    }
    if has_gpu():
        import torch

        properties = torch.cuda.get_device_properties(0)
        fields |= {
            "gpu": properties.name,
            "gpu_memory": str(properties.total_memory),
            "driver": _text(root / "sys/module/nvidia/version"),
            "cuda": str(torch.version.cuda),
            "pcie": pcie_link(properties, root),
        }
    return tuple(sorted(fields.items()))


@functools.cache
def _installed() -> dict[str, str]:
    """Versions, and the kernels: a process asks at every load, and keeps what it has imported."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba")}
    return versions | {"kernels": source_digest(kernel_folders())}


def kernel_folders() -> list[Path]:
    """Where the two kernel packages lie; neither is imported."""
    specs = (importlib.util.find_spec(name) for name in ("cpu_kernels", "gpu_kernels"))
    return [Path(folder) for spec in specs for folder in spec.submodule_search_locations]


def source_digest(folders: Iterable[Path]) -> str:
    """A hash of the Python files in these folders and their subfolders: kernels that were changed have other rates."""
    digest = hashlib.sha256()
    for folder in folders:
        for source in sorted(folder.rglob("*.py")):
            content = source.read_bytes()
            digest.update(f"{source.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def pcie_link(properties: object, root: Path = SYSTEM) -> str:
    """Greatest speed and width of a GPU's link; the current ones change with its power state.

    properties: of the device, with its PCI domain, bus and device numbers.
    """
    place = ":".join(
        f"{getattr(properties, name, 0):0{digits}x}" for name, digits in (("pci_domain_id", 4), ("pci_bus_id", 2))
    )
    folder = root / f"sys/bus/pci/devices/{place}:{getattr(properties, 'pci_device_id', 0):02x}.0"
    return f"{_text(folder / 'max_link_speed')} x{_text(folder / 'max_link_width')}"


def cpu_name(root: Path = SYSTEM) -> str:
    """The processor's own name where the system tells it."""
    try:
        with open(root / "proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache_bytes(root: Path = SYSTEM) -> int:
    """Size of the largest cache that the first CPU reads through; 0 where the system does not tell."""
    sizes = [_text(folder / "size") for folder in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*")]
    factors = {"K": 1 << 10, "M": 1 << 20}
    return max(
        (int(size[:-1]) * factors[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in factors), default=0
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"
