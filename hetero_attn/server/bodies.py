"""A request's body: read within limits of bytes, seconds and depth, and checked against what a protocol knows."""

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from hetero_attn.server.failures import ApiError
from hetero_attn.server.settings import ServerSettings

SMALL_BYTES = 1 << 16  # of them the worst takes 12 ms; of 8 MiB it takes 1.5 s, in which no stream would get a token
Body = TypeVar("Body", bound=BaseModel)


class BodyReader:
    """Reads the JSON bodies of one server's requests, the large ones on a thread of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._large = ThreadPoolExecutor(1, thread_name_prefix="hetero-attn-bodies")

    async def read(self, request: Request) -> dict[str, Any]:
        """A request's JSON object. Raises ApiError: 413 too large, 408 too slow, 415 encoded, 400 no such object."""
        settings = self._settings
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() not in ("", "identity"):
            raise ApiError(415, f"the body's content-encoding is {encoding!r:.40}; send it as it is, without one")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > settings.body_bytes:
            raise _too_large(settings)
        try:
            async with asyncio.timeout(settings.body_s):
                data = await _received(request, settings)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {settings.body_s:g} s; send it again") from None
        except ClientDisconnect:
            raise ApiError(499, "the client is gone") from None
        if len(data) <= SMALL_BYTES:
            return parse_object(data, settings.depth)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._large, parse_object, data, settings.depth, _whole)


async def _received(request: Request, settings: ServerSettings) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > settings.body_bytes:
            raise _too_large(settings)
        chunks.append(chunk)
    return b"".join(chunks)


def parse_object(data: bytes, depth: int, whole: Callable[[str], int] | None = None) -> dict[str, Any]:
    """The JSON object that some bytes are: no key twice, no NaN, nested at most `depth` deep. Raises ApiError.

    whole: reads whole numbers, in the place of what does it faster and holds the interpreter for all of them.
    """
    try:
        value = json.loads(
            data.decode(),  # of bytes it would guess the encoding
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=whole,
        )
    except RecursionError:
        raise _too_deep(depth) from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8; send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python reads no whole number of thousands of digits
        raise ApiError(400, "the body holds a whole number of thousands of digits; send a shorter one") from None
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ApiError(400, f"the body is a JSON {kind}; it must be an object")
    _check_depth(value, depth)
    return value


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ApiError(400, f"the key {twice!r:.60} stands twice in one object; give it once", param=f"{twice:.60}")
    return found


def _no_constant(name: str) -> None:
    raise ApiError(400, f"the body holds {name}, which is no JSON; leave the value out or give a number")


def _whole(text: str) -> int:
    return int(text)  # between two of these other threads have their turn


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"the body holds {text:.40}, which is beyond what a number can be; send a smaller one")
    return value


def _check_depth(value: Any, most: int) -> None:
    level = [value]
    for _ in range(most):
        inner = [item for item in level if isinstance(item, (dict, list))]
        if not inner:
            return
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    raise _too_deep(most)


def _too_deep(depth: int) -> ApiError:
    return ApiError(400, f"the body nests more than {depth} deep; flatten it")


def _too_large(settings: ServerSettings) -> ApiError:
    return ApiError(413, f"the body is larger than {settings.body_bytes} bytes; send less")


def checked(kind: type[Body], data: dict[str, Any]) -> Body:
    """A body as its protocol knows it. Raises ApiError that names the field at fault, by path, and the rule."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_context=False)
        path = _path(first, data)
        found = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        said = (each["msg"].removeprefix("Value error, ") for each in (first, *more) if _path(each, data) == path)
        rules = " or ".join(dict.fromkeys(said))
        raise ApiError(400, f"{path}: {rules}{found}", param=path or None) from None


def _path(error: Mapping[str, Any], data: Any) -> str:
    """Where in a body an error lies: pydantic names what a field may be among the keys, and a key that is wrong."""
    steps = []
    for step in error["loc"]:
        if isinstance(data, dict) and step in data or isinstance(data, list) and step in range(len(data)):
            steps.append(str(step))
            data = data[step]
    return ".".join([*steps, str(error["loc"][-1])] if error["type"] == "missing" else steps)


def refuse(data: BaseModel, **reasons: str) -> None:
    """Raise ApiError for a field that is set and that this server does not do: to ignore it would be a silent lie."""
    for name, reason in reasons.items():
        value = getattr(data, name, None)
        if value not in (None, False, "", [], {}):
            raise ApiError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_field")
