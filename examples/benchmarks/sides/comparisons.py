"""What is compared, what it should give, and how a result is shown: the targets of the CPU lane.

Targets are ratios to a peer of the same run, so that they hold on any machine; see whole_model.py for the run itself.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the table.

    test, tokens, depth, rows: of the request (peers.py). least, aim: of the ratio to the peer; for a batch, of the time
    over one row, where less is better; None is no target.
    """

    name: str
    dtype: str
    peer: str
    test: str
    tokens: int
    depth: int = 0
    rows: int = 1
    least: float | None = 1.0
    aim: float | None = None

    @property
    def request(self) -> dict[str, object]:
        """What both sides are asked."""
        return {"test": self.test, "tokens": self.tokens, "depth": self.depth, "rows": self.rows}

    @property
    def unit(self) -> str:
        """Of the figures of both sides."""
        return f"x time of 1 row, {self.rows} rows" if self.test == "batch" else "tokens/s"

    def quick(self) -> "Comparison":
        """The same with few tokens, to see that everything works."""
        return replace(self, tokens=min(self.tokens, 16), depth=min(self.depth, 80))


COMPARISONS = (
    Comparison("decode-bf16", "bf16", "llama.cpp", "decode", 128, least=1.0, aim=1.05),
    Comparison("prefill-bf16", "bf16", "llama.cpp", "prefill", 512, least=1.2, aim=1.5),
    Comparison("transformers-decode", "bf16", "transformers", "decode", 128, least=2.5),
    Comparison("transformers-prefill", "bf16", "transformers", "prefill", 512, least=1.3),
    Comparison("depth-0-bf16", "bf16", "llama.cpp", "decode", 32, least=None),
    Comparison("depth-1k-bf16", "bf16", "llama.cpp", "decode", 32, depth=1024, least=None),
    Comparison("depth-4k-bf16", "bf16", "llama.cpp", "decode", 32, depth=4096, least=None),
    Comparison("depth-bf16", "bf16", "llama.cpp", "decode", 32, depth=16_384, least=1.0, aim=1.3),
    Comparison("depth-64k-bf16", "bf16", "llama.cpp", "decode", 16, depth=65_536, least=None),
    Comparison("decode-q8", "q8", "llama.cpp", "decode", 128, least=1.15, aim=1.4),
    Comparison("prefill-q8", "q8", "llama.cpp", "prefill", 512, least=2.5, aim=3.5),
    Comparison("decode-q4", "q4", "llama.cpp", "decode", 128, least=1.0, aim=1.25),
    Comparison("prefill-q4", "q4", "llama.cpp", "prefill", 512, least=2.2, aim=3.0),
    Comparison("batch8-q4", "q4", "llama.cpp", "batch", 16, rows=8, least=2.0, aim=1.4),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a comparison gave. ours, peer: medians in `unit`; *_runs: every run.

    ratio: median over the repetitions of our figure over the peer's just after. bytes_per_s, ceiling_share,
    other_share: of
    our decode steps, None for prompts and batches: bytes of weights and cache read a second; speed of the linears over
    that of a sweep of the same weights, turn by turn; share of a step that reads neither. ceiling_bytes_per_s: a sweep
    before the row.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    least: float | None
    aim: float | None
    ours_runs: tuple[float, ...]
    peer_runs: tuple[float, ...]
    ceiling_bytes_per_s: float
    bytes_per_s: float | None = None
    ceiling_share: float | None = None
    other_share: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met; a dash where there is none, or no peer."""
        if self.least is None:
            return "-"
        if self.unit != "tokens/s":
            return "met" if self.ours <= self.least else "missed"
        return "-" if self.ratio is None else "met" if self.ratio >= self.least else "missed"

    def line(self) -> str:
        """One row of the table."""
        sign = ">= " if self.unit == "tokens/s" else "<= "
        target = "-" if self.least is None else f"{sign}{self.least:.2f}"
        cells = [
            f"{self.name:<21}{self.ours:>9.2f}",
            f"{'-' if self.peer is None else format(self.peer, '.2f'):>9}",
            f"{'-' if self.ratio is None else format(self.ratio, '.2f'):>7}",
            f"{target:>9}",
            f"{'-' if self.aim is None else format(self.aim, '.2f'):>6}",
            f"{self.verdict:>8}",
            f"{'-' if self.bytes_per_s is None else format(self.bytes_per_s / 1e9, '.1f'):>7}",
            f"{'-' if self.ceiling_share is None else format(self.ceiling_share, '.0%'):>8}",
            f"{'-' if self.other_share is None else format(self.other_share, '.1%'):>7}",
        ]
        return "".join(cells) + f"  {self.unit}, {self.peer_name}"


HEADINGS = (
    f"{'row':<21}{'ours':>9}{'peer':>9}{'ratio':>7}{'target':>9}{'aim':>6}{'':>8}{'GB/s':>7}{'linears':>8}{'other':>7}"
)
