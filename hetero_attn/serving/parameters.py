"""Sampling parameters for several prompts: one for all of them, or one for each."""

from collections.abc import Sequence

from hetero_attn.errors import SamplingError
from hetero_attn.serving.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams | None] | None


def for_each(params: Params, count: int) -> Sequence[SamplingParams | None]:
    """One `SamplingParams`, or None, for each of `count` prompts; raises SamplingError."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)) or not all(p is None or isinstance(p, SamplingParams) for p in params):
        raise SamplingError(
            f"params is {params!r:.60}; it must be one SamplingParams, a list of one for each prompt, or None"
        )
    if len(params) != count:
        raise SamplingError(
            f"params holds {len(params)} for {count} prompts; it must be one SamplingParams for all, or one for each"
        )
    return params
