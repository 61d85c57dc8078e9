"""Fixtures of several files about whole models and the command line."""

import pytest

import hetero_attn
from placement import HardwareProfile
from tests.support.processes.command import FakeLLM


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """Puts `FakeLLM` in the place of `hetero_attn.LLM`."""
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "ending", "stop")
    monkeypatch.setattr(FakeLLM, "context", 1000)
    monkeypatch.setitem(vars(hetero_attn), "LLM", FakeLLM)
    return FakeLLM


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """Puts a machine with a GPU in the place of the measurement."""
    base = HardwareProfile.named("emulated").to_dict() | {"name": "imagined", "source": "measured"}
    imagined = HardwareProfile.from_dict(base)
    monkeypatch.setitem(vars(hetero_attn), "profile_machine", lambda **_: imagined)
    return imagined
