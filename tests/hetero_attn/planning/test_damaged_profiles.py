"""A kept profile that is damaged, stale or no file of ours is never fatal, and planning never measures."""

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cpu_kernels.team import kept_files
from hetero_attn.engine import measure
from hetero_attn.planning import profiles
from hetero_attn.tools import doctor
from placement.machine.fingerprint import machine_fingerprint
from placement.machine.hardware import HardwareProfile
from placement.machine.rates import AttentionRate, DtypeRates, RowRate


def edited(**changes):
    """The kept profile with its fingerprint intact and some values changed, by field or by place in a field."""

    def edit(text):
        values = json.loads(text)
        for place, value in changes.items():
            *folders, name = place.split("__")
            target = values
            for folder in folders:
                target = target[int(folder) if folder.isdigit() else folder]
            target[name] = value
        return json.dumps(values)

    return edit


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
    "another object": lambda text: '{"name": 3}',
    "deep brackets": lambda text: "[" * 200_000,
    "deep value": lambda text: '{"name": ' + "[" * 200_000,
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode(),
    "2 MB": lambda text: text + " " * (2 << 20),
    "rows are a number": edited(cpu_rows=3),
    "rows are a million": edited(cpu_rows=[1] * 100_000),
    "fingerprint is text": edited(fingerprint="x"),
    "a call of 10^400 s": edited(cpu_call_s=10**400),
    "a call of an hour": edited(cpu_call_s=3600.0),
    "no cores": edited(cores=0),
    "a million cores": edited(cores=1_000_000),
    "more cores than there are": edited(cores=4096),
    "half a core": edited(cores=0.5),
    "q4 is never read": edited(cpu_linear_bytes_per_s__q4=0),
    "rows are never computed": edited(cpu_rows__0__ops_per_s__bf16=0),
    "attention never ends": edited(cpu_attention__0__ops_per_s=0),
    "attention over no bits": edited(cpu_attention__0__bits=0),
    "memory of 10^30 a second": edited(dram_bytes_per_s=1e30),
    "NaN": edited(step_overhead_s=float("nan")),
}


@pytest.fixture(scope="module")
def sound():
    """A profile of this machine that was not measured: rates of the catalogue under this machine's fingerprint."""
    machine = HardwareProfile.named("generic-cpu").with_threads(profiles.lane_threads())
    rates = DtypeRates(1e10, 1e10, 1e10, 1e10)
    rows, attention = (RowRate(1, rates), RowRate(8, rates)), (AttentionRate(16.0, 2, 64, 1e10, 1e10),)
    fingerprint = machine_fingerprint(profiles.lane_threads())
    return replace(machine, cpu_rows=rows, cpu_attention=attention, fingerprint=fingerprint)


@pytest.fixture
def kept(monkeypatch, tmp_path, sound):
    """The file in which that profile is kept, and a measurement that only counts itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    monkeypatch.setattr(measure, "profile_machine", lambda **_: made.append(1))
    profiles.keep(sound)
    assert profiles.stored_profile() == sound and profiles.profile_path().stat().st_mode & 0o777 == 0o600
    return SimpleNamespace(path=profiles.profile_path(), made=made)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_profile_is_not_used_and_measured_again(kept, damage):
    """Each of these ended every command with a traceback, or started a million threads."""
    text = DAMAGES[damage](kept.path.read_text())
    kept.path.write_bytes(text if isinstance(text, bytes) else text.encode())

    assert profiles.stored_profile() is None
    with pytest.warns(UserWarning, match="damaged or of another machine"):
        measure.refresh_profile()
    assert [1] == kept.made


@pytest.mark.parametrize("what", ["FIFO", "endless", "folder", "writable", "foreign"])
def test_a_profile_that_is_no_file_of_ours_is_not_used(kept, sound, what):
    """A FIFO hung every command, a link to /dev/zero took 7 GB, a folder ended the measurement with a traceback."""
    if what in ("FIFO", "endless", "folder"):
        kept.path.unlink()
    if what == "FIFO":
        os.mkfifo(kept.path)
    elif what == "endless":
        kept.path.symlink_to("/dev/zero")
    elif what == "folder":
        kept.path.mkdir()
    elif what == "writable":
        kept.path.chmod(0o666)
    elif os.getuid() == 0:
        os.chown(kept.path, 12345, 12345)
    else:
        pytest.skip("only root can give files away")

    assert profiles.stored_profile() is None and profiles.is_kept()
    with pytest.warns(UserWarning, match="is not used"):
        assert profiles.current_profile() is None
    if what == "folder":
        measure.refresh_profile()
        with pytest.warns(UserWarning, match=r"not kept \(it is a folder\)"):
            profiles.keep(sound)
    else:
        profiles.keep(sound)
        assert profiles.stored_profile() == sound
    assert [] == kept.made


def test_a_stale_profile_that_cannot_be_replaced_is_not_measured_again(kept, sound, monkeypatch):
    """On a read-only file system every start measured for minutes and then ended with a traceback."""
    kept.path.write_text(replace(sound, fingerprint=()).to_json())
    monkeypatch.setattr(kept_files.tempfile, "mkstemp", refuse_read_only)
    monkeypatch.setattr(kept_files.tempfile, "NamedTemporaryFile", refuse_read_only)
    measure.refresh_profile()

    assert [] == kept.made
    with pytest.warns(UserWarning, match="is not used"):
        assert profiles.current_profile() is None
    with pytest.warns(UserWarning, match=r"not kept \(Read-only file system\)"):
        profiles.keep(sound)


def refuse_read_only(*arguments, **named):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


ODD_HOMES = {"no home": None, "too long": "x" * 5000, "below a file": os.devnull}


@pytest.mark.parametrize("home", ODD_HOMES)
def test_where_nothing_can_be_kept_planning_still_works(monkeypatch, sound, home):
    """A container's user without a home, and a cache folder whose name is too long, ended every command."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(kept_files.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if ODD_HOMES[home]:
        monkeypatch.setenv("XDG_CACHE_HOME", ODD_HOMES[home])

    assert profiles.current_profile() is None
    with pytest.warns(UserWarning, match="not kept"):
        profiles.keep(sound)
    measure.refresh_profile()
    caches = {finding.name: finding for finding in doctor.caches()}
    assert {"compiled kernels", "machine profile", "hub checkpoints"} == set(caches)
    assert caches["compiled kernels"].verdict == "note"


def no_home():
    raise RuntimeError("Could not determine home directory.")
