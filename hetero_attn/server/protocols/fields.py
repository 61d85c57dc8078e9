"""Fields that bodies of several protocols share, and what they ask of `SamplingParams`."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hetero_attn.server.dialogue.forced import STRUCTURED, structured_wishes
from hetero_attn.server.failures import ApiError
from hetero_attn.server.service import Service
from hetero_attn.serving.sampling_params import LARGEST_SEED

MOST_LOGPROBS = 20
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "skip_special_tokens",
)


def _no_truth(value: Any) -> Any:
    """`true` is no number, though Python has it for 1."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth)]  # as the body of a request has it; every field of numbers is one
Number = Annotated[float, BeforeValidator(_no_truth)]
Logprobs = Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)]


class Fields(BaseModel):
    """A body, or part of one; what it does not know is ignored, and counted."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Fields):
    """What a stream carries beside the answer."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SamplingFields(Fields):
    """How to choose tokens, by OpenAI's and vLLM's names."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Integer | None = 1
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    logit_bias: dict[Integer, Number] | None = None
    skip_special_tokens: bool | None = None
    priority: Integer | None = 0
    user: str | None = None
    structured_outputs: dict[str, Any] | None = None

    def wishes(self, max_tokens: int | None) -> dict[str, Any]:
        """The given ones, by their name in `SamplingParams`."""
        found = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None} | seed_wish(self.seed)
        if max_tokens is not None:
            found["max_tokens"] = max_tokens
        return found | structured_wishes(self.structured_outputs or {})

    def names(self, max_tokens: str = "max_tokens", form: str | None = None) -> dict[str, str]:
        """What the client calls parameters that have another name in `SamplingParams`.

        max_tokens: the field that has them. form: another field that says what the answer follows, if one does.
        """
        given = self.structured_outputs or {}
        found = {"max_tokens": max_tokens}
        found |= {own: f"structured_outputs.{name}" for name, own in STRUCTURED.items() if given.get(name) is not None}
        return found | ({} if form is None else {"json_schema": form})

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream's last chunk says what the turn has cost."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every chunk of a stream says what the turn has cost so far."""
        return self.usage_at_end and bool(self.stream_options.continuous_usage_stats)


# vLLM's older names, which its clients still send; without them the answer would follow nothing.
OLDER_FORMS = {f"guided_{kind}": f"use structured_outputs.{kind}" for kind in ("json", "regex", "choice", "grammar")}


def count_unknown(service: Service, *bodies: BaseModel) -> None:
    """Count the fields that nothing here knows."""
    service.metrics.ignored(sum(len(body.model_extra or ()) for body in bodies))


def check_model(service: Service, model: str | None) -> None:
    """Any name does where one model is served, the empty one does not. Raises ApiError."""
    if model == "":
        raise ApiError(400, f"model is empty; it is called {service.model_name}", param="model")


def seed_wish(seed: int | None) -> dict[str, int]:
    """A client's seed, any whole number, by its name in `SamplingParams`; -1 leaves each answer to chance, as there."""
    return {} if seed in (None, -1) else {"seed": seed & LARGEST_SEED}


def new_id(prefix: str) -> str:
    """A name that no other answer has."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Whole seconds since the epoch, as `created` and `created_at` have them."""
    return int(time.time())
