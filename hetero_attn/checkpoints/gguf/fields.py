"""Typed, range-checked access to a GGUF file's metadata; every error names file, key, value and rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hetero_attn.errors import ConfigError
from hetero_attn.spec.json_fields import show

_REQUIRED = object()


class GgufFields:
    """Metadata of one file. Keys of the architecture are given without its name: `.rope.freq_base`."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values
        self.architecture = self.text("general.architecture")

    def key(self, name: str) -> str:
        """The whole key."""
        return self.architecture + name if name.startswith(".") else name

    def integer(self, name: str, high: int, default: Any = _REQUIRED, low: int = 1) -> Any:
        """An integer in [low, high]; an array of one and the same counts as that number."""
        value = self._value(name, default)
        if value is default:
            return value
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        return self.fail(name, value, f"an integer from {low} to {high}, the same in every layer")

    def number(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """A number in (low, high]."""
        value = self._value(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high
        if value is not default and not good:
            self.fail(name, value, f"a number above {low:g} and at most {high:g}")
        return value if value is default else float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        return value if isinstance(value, bool) else self.fail(name, value, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string, or the default where the key is absent."""
        value = self._value(name, default)
        return value if value is default or isinstance(value, str) else self.fail(name, value, "a text")

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty where there is none."""
        value = self._value(name, None)
        if value is None:
            return []
        good = isinstance(value, list) and (not value or isinstance(value[0], str))
        return value if good else self.fail(name, value, "a list of texts")

    def is_set(self, name: str) -> bool:
        """Whether a key has a value beside 0, false and nothing, an array one such item."""
        value = self.values.get(self.key(name))
        return bool(value.any() if isinstance(value, np.ndarray) else value)

    def is_list(self, name: str) -> bool:
        """Whether the value of a key is an array."""
        return isinstance(self.values.get(self.key(name)), np.ndarray | list)

    def numbers(self, name: str, count: int) -> np.ndarray | None:
        """An array of `count` numbers, or None."""
        value = self._value(name, None)
        if value is not None and (not isinstance(value, np.ndarray) or len(value) != count):
            self.fail(name, value, f"{count} numbers")
        return value

    def fail(self, name: str, value: Any, expected: str) -> NoReturn:
        """Refuse the value of a key."""
        raise ConfigError(f"{self.path}: {self.key(name)} is {show(value)}, expected {expected}; download it again")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(self.key(name))
        if value is None and default is _REQUIRED:
            raise ConfigError(f"{self.path}: the metadata has no {self.key(name)}, which every model needs")
        return default if value is None else value
