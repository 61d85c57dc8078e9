"""How the lanes queued their work before it was better: for what is measured beside it, and for planted faults."""

from typing import Any

from hetero_attn.ops import linear as linears


def rounded_apart(ops: Any) -> Any:
    """The operations of a recording as they once were: what a linear multiplies is rounded by a launch of its own."""

    class Apart(ops):
        def rounded_norm(self, x: Any, weight: Any, eps: float, out: Any, fmt: str) -> Any:
            self.rms_norm(x, weight, eps, out)
            return self.rounded(out, fmt)

        def rounded_gated(self, gate_up: Any, out: Any, activation: str, fmt: str) -> Any:
            getattr(self, activation)(gate_up, out)
            return self.rounded(out, fmt)

    return Apart


def request_behind_wait(
    lanes: Any, weights: Any, tier: int, split: Any, residual: Any, scratch: Any, add: bool = True
) -> None:
    """`linear_add` as it once was: the CPU lane is asked when the GPU has what the CPU lane computed before."""
    x, column, inputs, _ = split
    given, wanted = lanes.given, linears._wanted_input(weights, tier)
    lanes.push(x, wanted.start, column)
    lanes.pull(x, column, wanted.stop, given)
    if weights.has_host_features(tier):
        lanes._copied = True
        lanes.on_host(lambda: linears.run_on_host(lanes, weights, tier, x, scratch))
    linears.run_on_device(lanes, weights, tier, x, residual, add, inputs)
    if weights.has_host_features(tier):
        lanes.pull_onto(residual.device, scratch, weights.device_features(tier))
