"""Experts of a GGUF file by our names: all of a layer are one tensor each for gate, up and down, cut by its offsets."""

import re
from dataclasses import replace

from hetero_attn.checkpoints.gguf.file import GgufTensor
from hetero_attn.checkpoints.gguf.names import our_name

_STACKED = re.compile(r"blk\.(0|[1-9]\d{0,5})\.ffn_(gate_up|gate|up|down)_exps\.(weight|bias)")


def by_our_names(name: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
    """The tensors of ours that one of the file is: one, those of every expert, or none where no model of ours has it.

    The factor of a shared expert is a row here and a vector in the file.
    """
    stacked = _STACKED.fullmatch(name)
    if stacked and len(tensor.shape) == (3 if stacked[3] == "weight" else 2) and 0 not in tensor.shape:
        layer, both, kind = stacked.groups()
        parts = both.split("_")  # of both the rows of gate, then those of up
        size = tensor.nbytes // tensor.shape[0] // len(parts)
        rows, *inputs = tensor.shape[1:]
        return {
            f"model.layers.{layer}.mlp.experts.{index}.{part}_proj.{kind}": replace(
                tensor,
                shape=(rows // len(parts), *inputs),
                offset=tensor.offset + (index * len(parts) + place) * size,
                nbytes=size,
            )
            for index in range(tensor.shape[0])
            for place, part in enumerate(parts)
        }
    ours = our_name(name)
    if ours is None:
        return {}
    if "shared_expert_gate" in ours and len(tensor.shape) == 1:
        tensor = replace(tensor, shape=(1, *tensor.shape))
    return {ours: tensor}
