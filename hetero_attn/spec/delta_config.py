"""Gated DeltaNet in the place of some layers' attention, out of the keys of a config.

Each of `key_heads` query and key heads serves as many value heads as there are for one. Per value head a layer keeps a
matrix [key_dim, value_dim] for a sequence, and the last inputs of a short convolution over time.
"""

from dataclasses import dataclass
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS

LINEAR, FULL = "linear_attention", "full_attention"
MAX_KERNEL = 64


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Heads and their widths. kernel: how many inputs a step of the convolution reads. layers: which layers have it.

    is_tiled: whether the inputs of the last linear are the first value head of every key head, then the second of every
    one, and so on. has_rates: whether files hold -exp(A_log) in the place of A_log.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    layers: tuple[bool, ...]
    is_tiled: bool = False
    has_rates: bool = False

    @property
    def values_per_key(self) -> int:
        """Value heads that share one key head."""
        return self.value_heads // self.key_heads

    @property
    def key_width(self) -> int:
        """Features of all keys, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Features of all values, of their gates and of the output."""
        return self.value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        """Features that the convolution sees: queries, keys, values."""
        return 2 * self.key_width + self.value_width

    def rows_per_key_head(self, part: str) -> int:
        """Output features of a part that belong to one key head."""
        values = self.values_per_key
        widths = {"delta_q": self.key_dim, "delta_k": self.key_dim, "delta_v": values * self.value_dim}
        return (widths | {"delta_z": values * self.value_dim, "delta_b": values, "delta_a": values})[part]


def read_delta(fields: JsonFields, num_layers: int) -> DeltaConfig:
    """That of Qwen3-Next and Qwen3.5, whose layers are named one by one, or every so many attends in full."""
    types = fields.get("layer_types")
    if types is None:
        interval = fields.integer("full_attention_interval", MAX_LAYERS, 4)
        types = [LINEAR if (layer + 1) % interval else FULL for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        fields.fail("layer_types", types, f"a list of num_hidden_layers = {num_layers} names")
    if unknown := [name for name in types if name not in (LINEAR, FULL)]:
        raise UnsupportedModelError(
            f"{fields.path}: layer type {show(unknown[0])} is not supported. Known layer types: {LINEAR}, {FULL}"
        )
    found = DeltaConfig(
        key_heads=fields.integer("linear_num_key_heads", MAX_HEADS, 16),
        value_heads=fields.integer("linear_num_value_heads", MAX_HEADS, 32),
        key_dim=fields.integer("linear_key_head_dim", MAX_HEAD_DIM, 128),
        value_dim=fields.integer("linear_value_head_dim", MAX_HEAD_DIM, 128),
        kernel=fields.integer("linear_conv_kernel_dim", MAX_KERNEL, 4, low=2),
        layers=tuple(name == LINEAR for name in types),
    )
    if found.value_heads % found.key_heads:
        fields.fail(
            "linear_num_value_heads", found.value_heads, f"a multiple of linear_num_key_heads {found.key_heads}"
        )
    return found


def gguf_delta(fields: Any, layers: int, all_layers: int) -> DeltaConfig:
    """That of a GGUF file. layers: of the model, in front of those that predict further tokens among all_layers."""
    value_heads = fields.integer(".ssm.time_step_rank", MAX_HEADS)
    key_heads = fields.integer(".ssm.group_count", MAX_HEADS)
    width = fields.integer(".ssm.inner_size", MAX_HEADS * MAX_HEAD_DIM)
    if value_heads % key_heads:
        fields.fail(".ssm.time_step_rank", value_heads, f"a multiple of the {key_heads} key heads")
    if width % value_heads:
        fields.fail(".ssm.inner_size", width, f"a multiple of the {value_heads} value heads")
    named = fields.numbers(".attention.recurrent_layers", all_layers)
    interval = fields.integer(".full_attention_interval", MAX_LAYERS, 4)
    kinds = [(layer + 1) % interval != 0 for layer in range(layers)] if named is None else [bool(n) for n in named]
    return DeltaConfig(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer(".ssm.state_size", MAX_HEAD_DIM),
        value_dim=width // value_heads,
        kernel=fields.integer(".ssm.conv_kernel", MAX_KERNEL, low=2),
        layers=tuple(kinds[:layers]),
        has_rates=True,
    )
