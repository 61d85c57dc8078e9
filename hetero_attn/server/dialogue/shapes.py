"""Fields whose form no model of a body declares: each is what its protocol says, or an error that names it."""

from collections.abc import Mapping, Sequence
from typing import Any

from hetero_attn.server.failures import ApiError


def as_object(value: Any, field: str) -> Mapping[str, Any]:
    """A JSON object; null is an empty one. Raises ApiError that names the field."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{field} is {value!r:.40}; it must be an object", param=field)
    return value


def as_list(value: Any, field: str) -> Sequence[Any]:
    """A JSON array; null is an empty one. Raises ApiError that names the field."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ApiError(400, f"{field} is {value!r:.40}; it must be a list", param=field)
    return value


def as_kind(value: Any, field: str) -> str | None:
    """A word that says what an object is, or null. Raises ApiError that names the field."""
    if value is not None and not isinstance(value, str):
        raise ApiError(400, f"{field} is {value!r:.40}; it must be text", param=field)
    return value
