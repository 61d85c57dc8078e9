"""Small JSON files from strangers: read with limits, and every value checked for type and range as it is taken out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetero_attn.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
REQUIRED = object()


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a small JSON object, with limits on its size and nesting.

    Args:
        path: the file. max_bytes: refuse larger files unread.

    Raises:
        ConfigError: missing, too large, not UTF-8 JSON, nested too deeply, or not an object.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: file not found, a model directory needs it; check the path or download again")
    if (size := path.stat().st_size) > max_bytes:
        raise ConfigError(f"{path}: {size} bytes, expected at most {max_bytes}; this is no {path.name} of a model")
    try:
        value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON, line {error.lineno}: {error.msg}; download it again") from None
    except RecursionError:
        raise ConfigError(f"{path}: JSON nested too deeply; download it again") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    except ValueError as error:  # bytes that are not UTF-8, integers of thousands of digits
        raise ConfigError(f"{path}: not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found a JSON {type(value).__name__}, expected an object; download it again")
    return value


class JsonFields:
    """Typed, range-checked access to a JSON object; every error names file, key, value and rule.

    JSON null is kept apart from an absent key only in `get`: transformers treats null as "derive it".
    """

    def __init__(self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self.path, self.values, self.defaults = path, values, defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; the family's default, then `default`, when the key is absent."""
        return self.values.get(key, self.defaults.get(key, default))

    def integer(self, key: str, high: int, default: Any = REQUIRED, low: int = 1) -> Any:
        """An integer in [low, high]."""
        value = self._value(key, default)
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return value if value is default or good else self.fail(key, value, f"an integer from {low} to {high}")

    def number(self, key: str, low: float, high: float, default: Any = REQUIRED) -> Any:
        """A finite number in (low, high]."""
        value = self._value(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high
        if value is not default and not good:
            self.fail(key, value, f"a number above {low:g} and at most {high:g}")
        return value if value is default else float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(key, default)
        return value if isinstance(value, bool) else self.fail(key, value, "true or false")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self.path}: {key} is missing, every supported model has it; download the file again")
        return default if value is None else value

    def fail(self, key: str, value: Any, expected: str) -> Any:
        """Refuse the value of `key`; never returns."""
        raise ConfigError(f"{self.path}: {key} is {show(value)}, expected {expected}; correct it or download again")


def show(value: Any) -> str:
    """A value as an error message quotes it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
