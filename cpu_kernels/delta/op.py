"""delta_step: checks and launch; kernel.py computes."""

import torch
from torch import Tensor

from cpu_kernels.checks import bits_of, check_tensor, expect
from cpu_kernels.contract import DeltaRule, DeltaStates
from cpu_kernels.team.arguments import DELTA
from cpu_kernels.team.team import Team

LANES = 16


def delta_step(
    team: Team, projected: Tensor, gates: Tensor, rule: DeltaRule, both: DeltaStates, ids: Tensor, out: Tensor
) -> None:
    states, spare = both
    check_tensor("projected", projected, torch.float32, (None, None, None))
    rows, key_heads, unit = projected.shape
    taps, value_dim, value_heads = rule.conv.shape[0], rule.norm.shape[0], rule.rates.shape[0]
    key_dim, per_key = _check_rule(rule, key_heads, unit)
    check_tensor("gates", gates, torch.float32, (rows, None))
    expect(gates.shape[1] >= 2 * value_heads, f"gates has {gates.shape[1]} columns; {value_heads} heads have two each")
    features = rule.conv.shape[1]
    size = value_heads * key_dim * value_dim + (taps - 1) * features
    check_tensor("states", states, torch.float32, (None, size))
    if spare is not None:
        check_tensor("spare", spare, torch.float32, (None, size))
    check_tensor("ids", ids, torch.int64, (rows,))
    check_tensor("out", out, torch.float32, (rows, value_heads * value_dim))
    if not rows:
        return
    head_bytes = 4 * (2 * key_dim + (per_key + 2) * value_dim)
    failure = team.run(
        ("delta.kernel", "delta_step", key_dim % LANES == 0 and value_dim % LANES == 0),
        key_heads * head_bytes,
        *DELTA.filled(
            x=projected.data_ptr(),
            x_row=4 * projected.stride(0),
            x_head=4 * projected.stride(1),
            gates=gates.data_ptr(),
            gates_row=4 * gates.stride(0),
            rows=rows,
            key_heads=key_heads,
            values_per_key=per_key,
            key_dim=key_dim,
            value_dim=value_dim,
            conv=rule.conv.data_ptr(),
            taps_row=4 * features,
            taps=taps,
            rates=rule.rates.data_ptr(),
            dt_bias=rule.dt_bias.data_ptr(),
            norm=rule.norm.data_ptr(),
            eps=bits_of(rule.eps),
            states=states.data_ptr(),
            states_row=4 * states.stride(0),
            sequences=states.shape[0],
            spare=0 if spare is None else spare.data_ptr(),
            spare_row=0 if spare is None else 4 * spare.stride(0),
            spares=0 if spare is None else spare.shape[0],
            ids=ids.data_ptr(),
            out=out.data_ptr(),
            out_row=4 * out.stride(0),
            out_key=4 * value_dim * (1 if rule.is_tiled else per_key),
            out_value=4 * value_dim * (key_heads if rule.is_tiled else 1),
            head_bytes=head_bytes,
        ),
    )
    drafts = "" if spare is None else f", or be ~id of a draft with an id in 0..{spare.shape[0] - 1}"
    expect(failure == 0, f"ids must lie in 0..{states.shape[0] - 1}, the rows of states{drafts}")


def _check_rule(rule: DeltaRule, key_heads: int, unit: int) -> tuple[int, int]:
    """(key_dim, value heads of a key head)."""
    check_tensor("norm", rule.norm, torch.float32, (None,))
    check_tensor("rates", rule.rates, torch.float32, (None,))
    value_dim, value_heads = rule.norm.shape[0], rule.rates.shape[0]
    check_tensor("dt_bias", rule.dt_bias, torch.float32, (value_heads,))
    check_tensor("conv", rule.conv, torch.float32, (None, None))
    (taps, features), per_key = rule.conv.shape, value_heads // max(key_heads, 1)
    expect(taps >= 2 and rule.conv.is_contiguous(), f"conv has {taps} taps; it must be contiguous and have at least 2")
    expect(
        key_heads > 0 and value_heads % key_heads == 0,
        f"rates has {value_heads} value heads; they must divide over the {key_heads} key heads of projected",
    )
    key_dim = (features - value_heads * value_dim) // (2 * key_heads)
    expect(
        key_dim > 0 and 2 * key_heads * key_dim + value_heads * value_dim == features,
        f"conv has {features} features; they must be two of every key head and {value_heads} values of {value_dim}",
    )
    width = 2 * (key_dim + per_key * value_dim)
    expect(unit >= width, f"projected has {unit} features a key head; it must have {width}")
    return key_dim, per_key
