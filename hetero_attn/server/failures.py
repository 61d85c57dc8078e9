"""What went wrong, as each protocol tells it: a status, a type, a code and a sentence that names the way out."""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from hetero_attn.errors import (
    EngineDeadError,
    HeteroError,
    PromptError,
    QueueFullError,
    SamplingError,
    printable,
)
from hetero_attn.server.sse import JsonAnswer
from hetero_attn.serving.sampling_params import GRAMMARS

LOG = logging.getLogger("hetero_attn.server")
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer that is an error. param: path of the field at fault. retry_after_s: when to ask again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(message), param, code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """What the answer carries beside its body."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def as_api_error(error: BaseException) -> ApiError:
    """Any failure as the answer to the client. What nobody foresaw is logged by place and kind, never with values."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        words = {404: "there is nothing at this address", 405: "this address takes another method"}
        return ApiError(error.status_code, words.get(error.status_code, error.detail))
    if isinstance(error, SamplingError):
        return refused_parameter(error, {})
    if isinstance(error, PromptError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after_s=1)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, HeteroError):
        return ApiError(500, str(error), code="engine_error")
    place = "".join(traceback.format_tb(error.__traceback__)[-3:])
    LOG.error("%s in a request, at\n%s", type(error).__name__, place)
    return ApiError(500, f"the server met a {type(error).__name__}; its log says where")


def refused_parameter(error: SamplingError, names: Mapping[str, str]) -> ApiError:
    """A sampling parameter that cannot be, by the name that its client gave it.

    names: of parameters that it calls otherwise. A form of the answer without a name there is none that it asked for.
    """
    own, message = error.parameter, str(error)
    name = names.get(own, None if own in (*GRAMMARS, "grammar_after") else own)
    if name is not None and message.startswith(f"{own} "):
        message = name + message.removeprefix(own)
    return ApiError(400, message, param=name)


def too_long(tokens: int, max_context: int, param: str) -> ApiError:
    """A prompt beyond the context, in the words that agents recognise and answer by compacting."""
    return ApiError(
        400,
        f"This model's maximum context length is {max_context} tokens. However, your messages resulted in {tokens} "
        "tokens, and the answer needs room too. Please reduce the length of the messages, or serve with a larger "
        "--context.",
        param=param,
        code="context_length_exceeded",
    )


def body_of(error: ApiError, path: str) -> dict[str, Any]:
    """The error in the form of the protocol that a path belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    if path.startswith("/api/"):
        return {"error": error.message}
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def response_of(error: BaseException, path: str) -> JsonAnswer:
    """The whole answer that an error becomes."""
    known = as_api_error(error)
    return JsonAnswer(body_of(known, path), known.status, headers=known.headers)
