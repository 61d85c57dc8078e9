"""What a certificate for a placement says: how far a plan is from the reference, and how far rounding may be."""

import math
from dataclasses import asdict, dataclass

from hetero_attn.tools.forced_runs import Distance
from hetero_attn.tools.routes.watch import RouteAgreement


@dataclass(frozen=True, slots=True)
class KvCost:
    """How far the logits of a quantised cache are from those of a plain one: nmse, token_agreement as in Distance.

    loss: mean natural log of the probability that the compared tokens lose, so exp(loss) is the factor of perplexity.
    """

    against: str
    nmse: float
    token_agreement: float
    loss: float

    def line(self) -> str:
        """One line of the report."""
        return (
            f"  {self.against} KV instead would differ by NMSE {self.nmse:.2e}, {1 - self.token_agreement:.2%} other "
            f"tokens;\n  this cache: perplexity {100 * (math.exp(self.loss) - 1):+.2f} %\n"
        )


@dataclass(frozen=True, slots=True)
class StageError:
    """What one stage (embedding, a layer, head) does otherwise than the reference, given the reference's own input.

    error: squared error over the square of what the stage adds, mean over tokens. rounding: the same of the reference
    against exact arithmetic. limit: the most that `error` may be, for this rounding and for sums onto the residual that
    fall to the other of two float32.
    """

    name: str
    error: float
    rounding: float
    limit: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far a plan's logits are from the reference's, and how far rounding alone puts the reference from the truth.

    nmse, mean_kl, token_agreement: of the plan against the reference, see `Distance`. rounding: of the reference
    against its twin in exact arithmetic. stages: layer by layer. kv_cost: what a quantised cache costs, None beside a
    plain one. routes: of a mixture of experts, whose other figures are of runs by the experts that the reference
    chose; None for a dense model.
    """

    model: str
    device: str
    reference: str
    weight_dtype: str
    kv_dtype: str
    tokens: int
    max_abs_error: float
    nmse: float
    nmse_limit: float
    mean_kl: float
    token_agreement: float
    rounding: Distance
    stages: tuple[StageError, ...]
    kv_cost: KvCost | None
    routes: RouteAgreement | None = None

    @property
    def first_divergence(self) -> StageError | None:
        """The first stage that differs by more than rounding explains, None where none does."""
        return next((stage for stage in self.stages if not stage.error <= stage.limit), None)

    @property
    def passed(self) -> bool:
        """Whether the error is within what the arithmetic explains, at the end and in every layer."""
        routed = self.routes is None or self.routes.wrong == 0
        return routed and self.nmse <= self.nmse_limit and self.first_divergence is None

    def table(self) -> str:
        """Plain text for people, at most 80 columns wide."""
        plan = Distance(self.nmse, self.mean_kl, self.token_agreement)
        verdict = "the plan gives the same answer" if self.passed else "THE PLAN CHANGES THE ANSWER"
        return (
            f"{self.model} {self.weight_dtype}, {self.kv_dtype} KV, on {self.device}, {self.tokens} tokens\n"
            f"{'':<38}     NMSE     mean KL   same top token\n"
            f"  {f'plan, from {self.reference}':<36}{_figures(plan)}\n"
            f"  {'reference, from exact arithmetic':<36}{_figures(self.rounding)}\n"
            f"  NMSE may be {self.nmse_limit:.1e}; largest error of a logit {self.max_abs_error:.1e}\n"
            f"{self._stage_line()}"
            f"{'' if self.routes is None else self.routes.line()}"
            f"{'' if self.kv_cost is None else self.kv_cost.line()}"
            f"{verdict}"
        )

    def _stage_line(self) -> str:
        first = self.first_divergence
        shown = first or max(self.stages, key=lambda stage: stage.error / stage.limit)
        what = "first beyond its limit" if first else "nearest to its limit"
        return (
            f"  layer by layer, {what}: {shown.name},\n"
            f"    error {shown.error:.1e}, limit {shown.limit:.1e}, rounding there {shown.rounding:.1e}\n"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        first = self.first_divergence
        return asdict(self) | {"passed": self.passed, "first_divergence": None if first is None else first.name}


def _figures(found: Distance) -> str:
    return f"{found.nmse:>9.2e}   {found.mean_kl:>9.2e}   {found.token_agreement:>14.2%}"
