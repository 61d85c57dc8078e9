"""Names of test cases that are the same in every process, as sharing tests out over processes needs them."""

from typing import Any


def case_name(value: Any) -> str:
    """For `ids=`: functions by their own name, everything else as it prints, without an address in memory."""
    if callable(value):
        return value.__name__
    return type(value).__name__ if " at 0x" in str(value) else str(value)
