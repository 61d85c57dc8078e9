"""What the control groups of this process allow, versions 1 and 2: libraries that ask the machine do not see it.

Every function takes the folder that holds proc and sys, so that a test can lay out its own.
"""

from collections.abc import Iterator
from pathlib import Path

# A group of version 1 without a limit reports a number near 2**63; version 2 says "max".
NO_LIMIT_BYTES = 2**60


def memory_limit_bytes(root: Path) -> int | None:
    """The smallest memory limit of this process's control groups, versions 1 and 2; None where there is none."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read_text(folder / name)
            if _is_number(text) and int(text) < NO_LIMIT_BYTES:
                limits.append(int(text))
    return min(limits, default=None)


def free_memory_bytes(root: Path) -> int | None:
    """What the memory limits of this process's control groups leave, the least of all; None where there is none.

    Pages of files count as used there, though the kernel takes them back when memory is wanted.
    """
    left = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = read_text(folder / limit_name), read_text(folder / used_name)
            if _is_number(limit) and _is_number(used) and int(limit) < NO_LIMIT_BYTES:
                files = sum(_statistic(folder, name) for name in ("inactive_file", "active_file"))
                left.append(max(0, int(limit) - max(0, int(used) - files)))
    return min(left, default=None)


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that this process's control groups allow, versions 1 and 2; None where there is no quota."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        fields = read_text(folder / "cpu.max").split()
        fields = fields or [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
        if len(fields) == 2 and all(map(_is_number, fields)) and int(fields[1]) > 0:
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups and of all their parents: a limit anywhere above counts."""
    base = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, separator, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if not (separator and second):
            continue
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controllers if controllers else base
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])


def _statistic(folder: Path, name: str) -> int:
    """A number of memory.stat; 0 where there is none."""
    for line in read_text(folder / "memory.stat").splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and _is_number(words[1]):
            return int(words[1])
    return 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def read_text(path: Path) -> str:
    """A small text file, stripped; empty where it cannot be read. Bytes that are no UTF-8, as names of groups may
    have, are kept so that they name the same file."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""
