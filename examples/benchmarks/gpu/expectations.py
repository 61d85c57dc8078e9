"""What `gpu_offload.py` should find on an H100 with 16 cores, by a review of the code, and what to do if not."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Expectation:
    """One figure: `field` of the result `name`, in `unit`s; a dot leads into a field's fields. It should lie between
    low and high. decide: what a figure outside means."""

    name: str
    field: str
    unit: float
    low: float
    high: float
    decide: str

    def value(self, results: dict[str, dict[str, Any]]) -> float | None:
        """The figure, None where it was not found."""
        found: Any = results.get(self.name, {})
        for key in self.field.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return None if found is None else found / self.unit


RIVALS = {
    "50%": "below llama.cpp's 41.8 (decode) or 5373 (pp4096): that first",
    "25%": "below llama.cpp's 26.4 (decode) or 4238 (pp4096): that first",
}


def _model(share: str, plan: str, decode: tuple[float, float], prompt: tuple[float, float]) -> list[Expectation]:
    name, worse = (f"model 8b q4 {share} {plan}", RIVALS.get(share, "see parked, rest and launches below"))
    return [
        Expectation(f"{name}: decode", "tokens_per_s", 1, *decode, worse),
        Expectation(f"{name}: pp4096", "tokens_per_s", 1, *prompt, worse),
    ]


BUSY = "waits outside: hops or copies come late"
EXPECTATIONS = [
    Expectation("sanity toy model", "nmse", 1, 0, 5e-4, "wrong: stop, keep the logs"),
    Expectation(
        "sanity hop graph", "us_per_hop", 1, 8, 15, "a hop costs more: every plan that shares linears is too sure"
    ),
    Expectation("sanity hop graph", "p50_us", 1, 8, 18, "Python jobs; far above the mean: the worker is woken late"),
    Expectation(
        "sanity hop graph busy",
        "p95_us",
        1,
        0,
        30,
        "parked streams share a queue with copies: CUDA_DEVICE_MAX_CONNECTIONS",
    ),
    Expectation("sanity full queue", "ended_unaided", 1, 1, 1, "the worker waits in the driver: safety before speed"),
    Expectation("rates", "bytes_per_s.sweep", 1e9, 145, 165, "other memory than before: compare no figures"),
    Expectation(
        "rates", "bytes_per_s.linear_q4", 1e9, 125, 145, "below: the CPU's linear; above: something was cached"
    ),
    Expectation("rates", "bytes_per_s.h2d", 1e9, 45, 56, "below: pieces or pinning"),
    Expectation("rates", "bytes_per_s.sum", 1e9, 145, 165, "below a sweep: copies and cores hinder each other"),
    Expectation("rates", "gpu_rows_ops_per_s.512", 1e12, 330, 400, "dequantise, product and copy: see the stages"),
    Expectation("rates", "gpu_rows_ops_per_s.2048", 1e12, 420, 520, "the same"),
    *_model("75%", "auto", (98, 110), (8_000, 10_500)),
    *_model("75%", "prompts", (98, 112), (11_000, 20_000)),
    Expectation("model 8b q4 75% prompts: decode", "parked_ms", 1, 1.8, 3.2, BUSY),
    Expectation("model 8b q4 75% prompts: decode", "rest_ms", 1, 0, 1.1, "Python and argmax between steps first"),
    Expectation("model 8b q4 75% prompts: pp4096", "us_per_launch", 1, 0, 30, "launches past JIT, fewer page copies"),
    *_model("50%", "prompts", (55, 65), (9_000, 20_000)),
    *_model("25%", "prompts", (40, 50), (6_000, 17_000)),
    *_model("50%", "auto", (55, 65), (5_000, 20_000)),
    *_model("25%", "auto", (40, 50), (2_400, 17_000)),
]
