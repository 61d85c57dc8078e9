"""EAGLE-3 heads as a family: the layer of Llama with the terms of `spec.draft_heads.eagle_config`."""

from collections.abc import Mapping
from typing import Any

from hetero_attn.errors import UnsupportedModelError
from hetero_attn.spec.draft_heads.eagle_config import ARCHITECTURES, read_eagle
from hetero_attn.spec.families.family import Family
from hetero_attn.spec.families.windows import windows_from
from hetero_attn.spec.json_fields import JsonFields
from hetero_attn.spec.tensor_names import LAYER_PREFIX, TensorNames, tensor_name


class HeadNames(TensorNames):
    """What the files of a head call its tensors: nothing stands in front of most names, and its layer is `midlayer`
    or the first one."""

    __slots__ = ()

    def ours(self, name: str) -> str:
        """As `TensorNames`."""
        name = name.removeprefix("model.")
        for prefix in ("midlayer.", "layers.0."):
            if name.startswith(prefix):
                return f"{LAYER_PREFIX}0.{name.removeprefix(prefix)}"
        top = {tensor_name(part).removeprefix("model."): tensor_name(part) for part in ("embed", "final_norm")}
        return top.get(name, name)


def head_terms(fields: JsonFields, found: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of a head of one layer; its lm_head is never its embedding."""
    if found["num_layers"] != 1:
        raise UnsupportedModelError(
            f"{fields.path}: num_hidden_layers is {found['num_layers']}; only heads of one layer are computed"
        )
    return {
        "eagle": read_eagle(fields, found["hidden_size"], found["vocab_size"]),
        "tie_word_embeddings": False,
    }


EAGLE3 = Family(
    ARCHITECTURES[0],
    {"max_position_embeddings": 2048, "num_hidden_layers": 1},
    mlp_bias="mlp_bias",
    windows=windows_from("max_window_layers"),
    terms=head_terms,
    tensor_names=HeadNames(),
)
