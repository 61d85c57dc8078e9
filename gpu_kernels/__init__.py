"""Triton kernels of the GPU lane, each beside its oracle in `reference`; Triton is imported when one is first used.

Knows nothing of the other packages: an op takes tensors, writes its `out` arguments in place and launches on the
current CUDA stream. It neither synchronises nor reads device data on the host, so every op can be captured in a graph.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF_OP = {
    "linear": "linear_layer",
    "rounded": "linear_layer",
    "rounded_norm": "fused.rounded_ops",
    "rounded_gated": "fused.rounded_ops",
    "decode_attention": "attention.decode",
    "prefill_attention": "attention.prefill",
    "merge": "attention.merge",
    "rms_norm": "elementwise",
    "layer_norm": "small.layer_norm",
    "gelu": "small.gelu",
    "gather_columns": "small.gather",
    "rope_append": "rope",
    "silu_mul": "elementwise",
    "gelu_mul": "elementwise",
    "route": "experts.routing",
    "expert_linear": "experts.expert_linear",
    "combine": "experts.routing",
    "scale_rows": "experts.routing",
    "add_expert_bias": "experts.routing",
    "add_sinks": "experts.routing",
    "sigmoid_mul": "experts.routing",
    "clamped_silu_mul": "small.clamped",
    "norm_heads": "experts.routing",
    "delta_step": "small.delta_step",
    "copy_rows": "row_copies",
    "add_rows": "row_copies",
}

__all__ = list(_MODULE_OF_OP)


def __getattr__(name: str) -> Any:
    """Import the module of an op when the op is first asked for, and keep the op."""
    if name not in _MODULE_OF_OP:
        raise AttributeError(f"gpu_kernels has no op {name!r}; ops: {', '.join(__all__)}")
    op = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_OP[name]}"), name)
    return op
