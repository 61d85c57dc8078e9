"""Value heads of gated DeltaNet in the order of GGUF files of Qwen3.5: the first of every key head, then the second of
every one, and so on, where ours are those of the first key head, then those of the second.

Only rows are brought into our order here; the inputs of the last linear stay in the file's (`DeltaConfig.is_tiled`).
"""

from dataclasses import replace

from hetero_attn.checkpoints.gguf.file import GgufTensor
from hetero_attn.spec.delta_config import DeltaConfig
from hetero_attn.spec.tensor_names import split_name, tensor_name


def in_our_order(name: str, tensor: GgufTensor, delta: DeltaConfig) -> GgufTensor:
    """A tensor by our name with its rows in our order; any that has none of value heads as it is."""
    layer, part, kind = split_name(name)
    parts = {
        tensor_name("delta_v", layer): (0, delta.value_dim),
        tensor_name("delta_z", layer): (0, delta.value_dim),
        tensor_name("delta_b", layer): (0, 1),
        tensor_name("delta_a", layer): (0, 1),
        tensor_name("delta", layer, "A_log"): (0, 1),
        tensor_name("delta", layer, "dt_bias"): (0, 1),
        tensor_name("delta_conv", layer): (2 * delta.key_width, delta.value_dim),
    }
    if not part or name not in parts:
        return tensor
    before, rows = parts[name]
    if not tensor.shape or tensor.shape[0] != before + delta.value_heads * rows:
        return tensor  # which is refused by its shape
    runs = tuple(
        (before + (value * delta.key_heads + key) * rows, rows)
        for key in range(delta.key_heads)
        for value in range(delta.values_per_key)
    )
    return replace(tensor, runs=(((0, before),) if before else ()) + runs)
