"""What the blocks of a decoder declare alike: the norm in front of a block, and the buffers around one."""

from hetero_attn.spec.blocks import BufferSet, Vector
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import layer_scalar, tensor_name
from hetero_attn.spec.weights import LinearSpec

NORMED, SHARED = "normed", "shared_normed"  # buffers of normalised rows: a block's own, a parallel layer's
REORDERED = "reordered"  # the buffer of rows in the order in which a weight has its inputs


def norm_vectors(config: ModelConfig, part: str, layer: int | None, scale: float = 1.0) -> tuple[Vector, ...]:
    """The vectors of the norm in front of a block, whose weight is `part` of a checkpoint; scale: on what it gives."""
    weight = Vector("norm", tensor_name(part, layer), config.hidden_size, config.norm_offset, scale)
    bias = Vector("norm_bias", tensor_name(part, layer, "bias"), config.hidden_size, 0.0, scale)
    return (weight, bias) if config.norm_bias else (weight,)


def scalar_vectors(config: ModelConfig, layer: int) -> tuple[Vector, ...]:
    """The number by which what leaves a layer is multiplied, where a model has such."""
    return (Vector("layer_scalar", layer_scalar(layer), 1),) if config.layer_scalars else ()


def projected_buffer(last: LinearSpec) -> BufferSet:
    """Where a block with a post norm keeps what its last linear gives until it is normalised."""
    return BufferSet("projected", (("projected", last.out_features),))


def reordered_buffers(linears: tuple[LinearSpec, ...]) -> tuple[BufferSet, ...]:
    """Where a block brings what it multiplies into the order of the weights' inputs, if any weight asks for it."""
    widths = [linear.in_features for linear in linears if linear.is_reordered]
    return (BufferSet(REORDERED, ((REORDERED, max(widths)),)),) if widths else ()
