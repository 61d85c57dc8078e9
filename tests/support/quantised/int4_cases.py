"""Models by GPTQ, AWQ and compressed-tensors, each form of their files by a name."""

import functools

from tests.support.quantised.int4_models import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
)

gptq_v2 = functools.partial(gptq, taken=0)


def symmetric(groups, each):
    """compressed-tensors without zero points, which are then all 8."""
    return {part: item for part, item in compressed(groups, each).items() if part != "weight_zero_point"}


# writer, config, inputs of a group, further arguments of make_int4
INT4_CASES = {
    "gptq": (gptq, gptq_config(128), 128, {}),
    "gptq sym": (gptq, gptq_config(64, sym=True), 64, {"symmetric": True}),
    "gptq sym that declares the first version and is the second": (
        gptq_v2,
        gptq_config(32, sym=True),
        32,
        {"symmetric": True, "family": "qwen2"},
    ),
    "gptq v2": (gptq_v2, gptq_config(32, checkpoint_format="gptq_v2"), 32, {}),
    "gptq whole rows": (gptq, gptq_config(-1), -1, {}),
    "awq": (awq, awq_config(64), 64, {}),
    "awq 128": (awq, awq_config(128), 128, {"family": "qwen3"}),
    "compressed asymmetric": (compressed, compressed_config(32), 32, {}),
    "compressed symmetric": (symmetric, compressed_config(128, symmetric=True), 128, {"symmetric": True}),
    "compressed rows": (compressed, compressed_config(-1), -1, {}),
}
