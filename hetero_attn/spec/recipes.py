"""Recipes: which format each weight of a model gets when the model is quantised here, by the name of a dtype.

A recipe is a list of rules, a glob over the names of weights and a format; the last rule that matches a weight decides.
The names are `head` and, in a layer, `layers.12.q`, `.k`, `.v`, `.o`, `.gate`, `.up`, `.down`, also of its experts.

A head that is also the token embedding is never coarser than q8: four bits of it cost SmolLM2-135M 12 % of its
perplexity, as much as half of what all other weights cost together, and one q8 table for both takes fewer bytes than a
q4 head beside a bf16 embedding. `v` and `down` are what llama.cpp's mixtures keep finer too: few bytes, most error.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.tensor_names import expert_tensor, tensor_name
from hetero_attn.spec.weight_formats import WeightFormats, weight_formats

LINEAR_PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Recipe:
    """rules: (glob, format) in order, the last match decides; the first is of all weights. tied_rules: more of them,
    for a model whose head is its embedding."""

    name: str
    rules: tuple[tuple[str, str], ...]
    tied_rules: tuple[tuple[str, str], ...] = ()

    def formats(self, config: ModelConfig) -> WeightFormats:
        """The format of every weight of a model; the embedding shares a tied head's, else it is bfloat16."""
        tied = config.tie_word_embeddings
        rules = self.rules + (self.tied_rules if tied else ())
        by_tensor = {
            tensor_name(part, layer): _decided(rules, f"layers.{layer}.{part}")
            for layer in range(config.num_layers)
            for part in LINEAR_PARTS
        }
        by_tensor |= _of_experts(rules, config)
        head = _decided(rules, "head")
        by_tensor[tensor_name("embed" if tied else "head")] = head
        return WeightFormats(self.rules[0][1], head if tied else "bf16", by_tensor, self.name)


RECIPES = {
    item.name: item
    for item in (
        Recipe("q4", (("*", "q4"),), (("head", "q8"),)),
        Recipe("q4_m", (("*", "q4"), ("layers.*.v", "q8"), ("layers.*.down", "q8"), ("head", "q8"))),
    )
}


def formats_of(dtype: str, config: ModelConfig) -> WeightFormats:
    """The formats of a model that is held in a dtype or by the recipe of that name."""
    return RECIPES[dtype].formats(config) if dtype in RECIPES else weight_formats(dtype)


def _of_experts(rules: tuple[tuple[str, str], ...], config: ModelConfig) -> dict[str, str]:
    """The formats of experts, shared ones too, as those of the MLP in whose place they are."""
    if config.experts is None:
        return {}
    found = {}
    for layer in (layer for layer, has_experts in enumerate(config.experts.layers) if has_experts):
        for part in ("gate", "up", "down"):
            chosen = _decided(rules, f"layers.{layer}.{part}")
            tensors = [expert_tensor(layer, index, part) for index in range(config.experts.experts)]
            tensors += [tensor_name(f"shared_{part}", layer)] if config.experts.has_shared else []
            found |= dict.fromkeys(tensors, chosen)
    return found


def _decided(rules: tuple[tuple[str, str], ...], name: str) -> str:
    return next(chosen for pattern, chosen in reversed(rules) if fnmatchcase(name, pattern))
