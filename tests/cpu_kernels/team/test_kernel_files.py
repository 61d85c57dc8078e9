"""Files and folders of the store of compiled kernels: what is not ours or no file is not used, what cannot be kept is said.

Situations that ended a start, or made it wait for ever, and what each does now:

| the kernel's file or folder                          | now                                              |
|------------------------------------------------------|--------------------------------------------------|
| right checksum over nothing, garbage, another kernel | one line, compiled again (it was a dead process) |
| a folder, a FIFO, a link to an endless device        | one line, compiled again or in memory only       |
| another user's, or writable by others                | one line, never executed                         |
| folder of mode 777; of mode 755 or 711               | one line, in memory only; used                   |
| complete and read-only                               | used, nothing is compiled                        |
| read-only, full, without inodes or descriptors       | one line, in memory only                         |
| no home, a path too long or odd                      | one line, in memory only                         |
| leftovers of writers that were killed                | removed                                          |
| a temporary folder for each start                    | none is made                                     |
"""

import errno
import os
import shutil
from pathlib import Path

import pytest

from cpu_kernels.team import kept_files
from cpu_kernels.team.kept_files import UnusableFileError, read_kept, write_kept
from tests.support.kernels.kernel_stores import KERNEL, start


def as_folder(path):
    path.mkdir()


def as_fifo(path):
    os.mkfifo(path)


def as_endless_link(path):
    path.symlink_to("/dev/zero")


def as_link_to_a_sound_one(path):
    path.symlink_to(path.with_name("member.o"))


def as_huge(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


ODD_FILES = [as_folder, as_fifo, as_endless_link, as_link_to_a_sound_one, as_huge]


@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__)
def test_a_kernel_that_is_no_ordinary_file_is_compiled_again(store, make):
    (store / f"{KERNEL}.o").unlink()
    make(store / f"{KERNEL}.o")

    compiled, lines = start(store.parent)

    assert compiled == [KERNEL] and "is not used" in lines[0]
    assert len(lines) == 1 or (make is as_folder and "not kept" in lines[1] and len(lines) == 2)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602], ids=oct)
def test_a_kernel_that_others_may_write_is_not_executed(store, mode):
    (store / f"{KERNEL}.o").chmod(mode)
    compiled, (line,) = start(store.parent)

    assert compiled == [KERNEL] and "others may write to it" in line
    assert start(store.parent) == ([], [])


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_executed(store, monkeypatch, what):
    path = store / f"{KERNEL}.o" if what == "file" else store
    if os.getuid():
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)
    compiled, lines = start(store.parent)

    assert KERNEL in compiled
    assert any("belongs to user 12345" in line for line in lines)


@pytest.mark.parametrize("mode", [0o755, 0o711, 0o500], ids=oct)
def test_a_folder_that_others_may_only_read_is_used(store, mode):
    store.chmod(mode)

    assert start(store.parent) == ([], [])


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722], ids=oct)
def test_a_folder_that_others_may_write_is_left_alone(store, mode):
    store.chmod(mode)
    before = sorted(os.listdir(store))

    compiled, (line,) = start(store.parent)

    assert len(compiled) == 3 and "not kept" in line and "others may write to it" in line
    assert sorted(os.listdir(store)) == before


def failing(number: int):
    """mkstemp as it is on a disk in trouble."""

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


TROUBLES = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.EACCES]


@pytest.mark.parametrize("number", TROUBLES, ids=os.strerror)
def test_a_store_that_cannot_be_written_is_read_and_costs_one_line(store, monkeypatch, number):
    """A disk without inodes or a process without descriptors ended the start with an UnboundLocalError."""
    monkeypatch.setattr(kept_files.tempfile, "mkstemp", failing(number))
    assert start(store.parent) == ([], [])

    (store / f"{KERNEL}.o").unlink()
    (store / "member.o").unlink()
    compiled, (line,) = start(store.parent)

    assert compiled == ["member", KERNEL] and "not kept" in line and os.strerror(number) in line


def test_a_write_that_fails_half_way_leaves_nothing(store, monkeypatch):
    (store / f"{KERNEL}.o").unlink()
    monkeypatch.setattr(kept_files.os, "replace", failing(errno.ENOSPC))
    before = sorted(os.listdir(store))

    assert "not kept" in start(store.parent)[1][0]
    assert sorted(os.listdir(store)) == before


ODD_PLACES = {
    "too long": lambda tmp_path: tmp_path / ("x" * 300),
    "very deep": lambda tmp_path: tmp_path.joinpath(*["deep" * 20] * 60),
    "below a file": lambda tmp_path: Path(os.devnull) / "cache",
    "a file": lambda tmp_path: Path(os.devnull),
}


@pytest.mark.parametrize("place", ODD_PLACES)
def test_a_place_where_nothing_can_be_kept_costs_one_line(tmp_path, place):
    compiled, (line,) = start(ODD_PLACES[place](tmp_path))

    assert len(compiled) == 3 and "not kept" in line


def test_odd_characters_in_the_place_are_no_trouble(filled, tmp_path):
    odd = tmp_path / "caché \n\udcff;$(x)"
    shutil.copytree(filled, odd)

    assert start(odd) == ([], [])


def test_without_a_home_nothing_is_kept(monkeypatch):
    """A container's random user has neither HOME nor an entry in the list of users."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kept_files.Path, "home", no_home)

    compiled, (line,) = start(None)

    assert len(compiled) == 3 and "there is no home folder" in line


def test_leftovers_of_killed_writers_are_removed(store):
    for name in ("tmpabc123", f"tmpold{kept_files.TEMPORARY_SUFFIX}"):
        (store / name).write_bytes(b"half")
        os.utime(store / name, (0, 0))
    (store / f"tmpnew{kept_files.TEMPORARY_SUFFIX}").write_bytes(b"being written")

    assert start(store.parent) == ([], [])
    left = {name for name in os.listdir(store) if not name.endswith(".o")}
    assert left == {f"tmpnew{kept_files.TEMPORARY_SUFFIX}"}


def test_a_kept_file_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "folder" / "file"
    with pytest.raises(FileNotFoundError):
        read_kept(path, 100)
    write_kept(path, b"content")

    assert read_kept(path, 7) == b"content"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UnusableFileError, match="7 bytes, at most 6"):
        read_kept(path, 6)
