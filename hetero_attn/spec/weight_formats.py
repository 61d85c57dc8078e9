"""In which format each tensor of a model is held."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cpu_kernels.formats import format_of


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Names of formats by tensor. default: of tensors that `by_tensor` does not name. embed: of the token embedding as
    rows to gather from, which a tied head may hold otherwise. name: of the recipe that says so, if one does. reordered:
    the formats of tensors whose codes lie in another order of inputs, as long as they are held in these formats.
    """

    default: str
    embed: str
    by_tensor: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    reordered: Mapping[str, str] = field(default_factory=dict)

    def of(self, tensor: str) -> str:
        """The format of a tensor."""
        return self.by_tensor.get(tensor, self.default)

    def is_reordered(self, tensor: str) -> bool:
        """Whether what a tensor multiplies must be brought into the order of its inputs."""
        return self.reordered.get(tensor) == self.of(tensor)

    @property
    def names(self) -> tuple[str, ...]:
        """Every format that a linear may have, without repetition."""
        return tuple(dict.fromkeys((*self.by_tensor.values(), self.default)))

    @property
    def label(self) -> str:
        """What a table calls them: "q4", or "q4_k+q6_k" of a mixture without a name."""
        return self.name or "+".join(sorted(set(self.by_tensor.values()))) or self.default

    @property
    def rounding(self) -> str:
        """The dtype whose limits hold for a mixture, by what its formats round activations to: fp32, bf16 or q4."""
        rounded = {format_of(name).rounds_x_to for name in self.by_tensor.values() or (self.default,)}
        return "q4" if "int8" in rounded else "bf16" if "bf16" in rounded else "fp32"


def weight_formats(wanted: "str | WeightFormats") -> WeightFormats:
    """The formats of a model that is held in one dtype; formats are returned as they are.

    The embedding is float32 or float16 beside such weights, else bfloat16.
    """
    if isinstance(wanted, WeightFormats):
        return wanted
    return WeightFormats(wanted, wanted if wanted in ("fp32", "fp16") else "bf16")


def as_halves(stored: WeightFormats) -> WeightFormats:
    """Formats of 16 bits: fp16 where it is that already, else bf16, which has the range of all numbers."""
    half = {name: "fp16" if name == "fp16" else "bf16" for name in (*stored.names, stored.embed)}
    by_tensor = {tensor: half[name] for tensor, name in stored.by_tensor.items()}
    return WeightFormats(half[stored.default], half[stored.embed], by_tensor)
