"""What a policy's rules may say: shares of linears over the lanes, of a layer's cache, and by the size of a step."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from placement.plan.workload import ROW_TIER_NAMES
from placement.policy.fields import CountField, DtypeField, Share, ShareField
from placement.policy.problems import nearest

SUM_TOLERANCE = 1e-6


class Strict(BaseModel):
    """A part of a policy: unknown keys, other types and numbers that are none are refused; it cannot be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class TierRule(Strict):
    """Stream and cpu shares of one row tier; the GPU home is the same in every tier."""

    stream: ShareField = Field(None, description="Share that is copied to the GPU in this tier.")
    cpu: ShareField = Field(None, description="Share that CPU cores compute in this tier.")


class KvRule(Strict):
    """KV cache of a layer: how many KV heads the GPU owns, and how many of their newest tokens it keeps."""

    gpu_heads: CountField = Field(None, description="KV heads that the GPU owns; all, auto or a number.")
    gpu_tokens: CountField = Field(
        None, description="Newest tokens of those heads that stay in GPU memory; all, auto or a number."
    )


class Rule(Strict):
    """Shares, and the weight format, of every shard whose name matches.

    match: a glob over shard names; `layers.0-15.qkv` is a range of layers.
    """

    match: str = Field(
        min_length=1,
        max_length=256,
        description="Which shards: a glob over their names, such as `*.qkv`, or a range of layers, `layers.0-15.qkv`.",
    )
    gpu: ShareField = Field(
        None, description="Share that lives in GPU memory: a fraction of 1, or `N units`, or `N features`, or auto."
    )
    stream: ShareField = Field(None, description="Share that lives in DRAM and is copied to the GPU when it is needed.")
    cpu: ShareField = Field(None, description="Share that lives in DRAM and is computed there by CPU cores.")
    expert_slots: CountField = Field(
        None, description="Of experts in DRAM, how many of a layer have a copy in GPU memory; all, auto or a number."
    )
    tiers: dict[str, TierRule] = Field(
        default_factory=dict, description="Other stream and cpu shares for steps of so many rows, such as `2-4`."
    )
    kv: KvRule | None = Field(None, description="For the cache of a layer instead of a linear.")
    dtype: DtypeField = Field(
        None, description="How weights of a linear are kept: fp32, bf16, q8 or q4; the first rule that says it decides."
    )

    @property
    def sets_linears(self) -> bool:
        """Whether the rule says anything about linears."""
        shares = self.gpu, self.stream, self.cpu, self.expert_slots
        return any(share is not None for share in shares) or bool(self.tiers)

    def tier(self, name: str) -> tuple[Share | None, Share | None, Share | None]:
        """Shares (gpu, stream, cpu) in a row tier: those of the tier where it has an entry, else those of the rule."""
        if name in self.tiers:
            return self.gpu, self.tiers[name].stream, self.tiers[name].cpu
        return self.gpu, self.stream, self.cpu

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        for name in self.tiers:
            if name not in ROW_TIER_NAMES:
                raise ValueError(
                    f"unknown row tier {name!r}; tiers are {', '.join(ROW_TIER_NAMES)}{nearest(name, ROW_TIER_NAMES)}"
                )
        for name in (None, *self.tiers):
            _check_sum(*self.tier(name), f" in tier {name}" if name else "")
        if not self.sets_linears and self.kv is None and self.dtype is None:
            raise ValueError("the rule sets nothing; give gpu, stream, cpu, expert_slots, tiers, kv or dtype")
        return self


def _check_sum(gpu: Share | None, stream: Share | None, cpu: Share | None, where: str) -> None:
    given = [share for share in (gpu, stream, cpu) if share is not None]
    if any(share.kind != "fraction" for share in given):
        return
    total = sum(share.value for share in given)
    if len(given) == 3 and abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"gpu, stream and cpu{where} must sum to 1, they sum to {total:g}")
    if total > 1 + SUM_TOLERANCE:
        raise ValueError(f"the fractions{where} sum to {total:g}, more than 1")
