"""How the lanes queued their work before it was better: for what is measured beside it, and for planted faults."""

from typing import Any

from hetero_attn.ops import linear as linears


def request_behind_wait(lanes: Any, weights: Any, tier: int, x: Any, column: int, residual: Any, scratch: Any) -> None:
    """`linear_add` as it once was: the CPU lane is asked when the GPU has what the CPU lane computed before."""
    given, wanted = lanes.given, linears._wanted_input(weights, tier)
    lanes.push(x, wanted.start, column)
    lanes.pull(x, column, wanted.stop, given)
    if weights.has_host_features(tier):
        lanes._copied = True
        lanes.on_host(lambda: linears.run_on_host(lanes, weights, tier, x, scratch))
    linears.run_on_device(lanes, weights, tier, x, residual, True)
    if weights.has_host_features(tier):
        lanes.pull_onto(residual.device, scratch, weights.device_features(tier))
