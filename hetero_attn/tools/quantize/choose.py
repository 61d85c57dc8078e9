"""Which type every weight of a model gets: by a recipe, or the least loss in total for a number of bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.errors import ArgumentError
from hetero_attn.tools.quantize.encode import PLAIN, fits
from hetero_attn.tools.quantize.stacks import bits_of_type, is_router, stack_of
from placement.program.native_output import without_native_output

# Types to choose between when bits are given, and what takes a type's place where rows are no whole blocks of it.
CANDIDATES = ("IQ4_XS", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16")
INSTEAD = {"Q4_K": "IQ4_NL", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
PLAIN_OF = {"bf16": "BF16", "fp16": "F16"}
MOST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How large a file is: as if most linears, v and down, and head and embedding had these types.

    Which weight really has which is chosen for its own sake (`expected`), none a larger one than the largest of these.
    """

    most: str
    finer: str
    head: str


RECIPES = {
    "q8": Recipe("Q8_0", "Q8_0", "Q8_0"),
    "q6": Recipe("Q6_K", "Q6_K", "Q8_0"),
    "q5": Recipe("Q5_K", "Q5_K", "Q6_K"),
    "q4_m": Recipe("Q4_K", "Q6_K", "Q6_K"),
    "q4": Recipe("Q4_K", "Q4_K", "Q6_K"),
}


@dataclass(frozen=True, slots=True)
class Loss:
    """What a weight costs in each type that it may have. kl: the divergence on the text if it alone had the type."""

    rows: int
    in_features: int
    kl: Mapping[str, float]

    def nbytes(self, name: str) -> int:
        """Bytes in a type."""
        return self.rows * GGUF_BY_NAME[name].row_bytes(self.in_features)


def fitting(name: str, in_features: int, dtype: str = "") -> str:
    """The type, or what takes its place for rows of so many inputs; where no blocks do, plain numbers that hold all of
    `dtype`, the source's."""
    while not fits(name, in_features):
        name = INSTEAD.get(name) or PLAIN_OF.get(dtype, "F32")
    return name


def by_recipe(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Types of all tensors of a model by our names: vectors and routers are float32. dtypes: of the source's
    tensors."""
    chosen = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or is_router(name):
            chosen[name] = "F32"
            continue
        finer = ".v_proj." in name or ".down_proj." in name
        of_layer = recipe.finer if finer else recipe.most
        wanted = of_layer if name.startswith("model.layers.") else recipe.head
        chosen[name] = fitting(wanted, shape[1], (dtypes or {}).get(name, ""))
    return chosen


def as_large_as(
    types: Mapping[str, str], losses: Mapping[str, Loss], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The types of stacks whose losses add up to the least in as many bytes as `types`, of all weights, and none of
    more bits than the largest of those. Weights that are plain numbers in `types` are left as they are."""
    names = [name for name, kind in types.items() if stack_of(name) in losses and kind not in PLAIN]
    most = max((bits_of_type(types[name]) for name in names), default=0.0)
    allowed = {
        stack: replace(loss, kl={kind: kl for kind, kl in loss.kl.items() if bits_of_type(kind) <= most})
        for stack, loss in losses.items()
        if stack in {stack_of(name) for name in names}
    }
    return by_bits(allowed, bits_of(types, shapes, names)) if names else {}


def by_bits(losses: Mapping[str, Loss], bits: float, fixed_bytes: int = 0, fixed_weights: int = 0) -> dict[str, str]:
    """The types whose losses add up to the least while all weights together have at most so many bits each.

    fixed_bytes, fixed_weights: of tensors whose type is not chosen. Raises ArgumentError for fewer bits than any choice
    has. Where the solver finds nothing in its time, what steps of the best exchange give.
    """
    weights = sum(loss.rows * loss.in_features for loss in losses.values()) + fixed_weights
    least = sum(min(map(loss.nbytes, loss.kl)) for loss in losses.values()) + fixed_bytes
    if least * 8 > bits * weights:
        raise ArgumentError(
            f"{bits:g} bits a weight are fewer than any choice of formats has; the least is {8 * least / weights:.2f}"
        )
    room = bits * weights / 8 + 0.5 - fixed_bytes  # bits that were computed of bytes are rounded
    return _solved(losses, room) or _stepwise(losses, room)


def _solved(losses: Mapping[str, Loss], room: float) -> dict[str, str]:
    """The best choice by mixed-integer programming; empty where none was found in MOST_SECONDS."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [(tensor, name) for tensor, loss in losses.items() for name in loss.kl]
    row_of = {tensor: row for row, tensor in enumerate(losses)}
    sizes = np.array([losses[tensor].nbytes(name) for tensor, name in options], float)
    of_tensor = ([row_of[tensor] for tensor, _ in options], range(len(options)))
    one_each = csr_array((np.ones(len(options)), of_tensor))
    costs = np.array([losses[tensor].kl[name] for tensor, name in options])
    with without_native_output():
        found = milp(
            costs / max(costs.max(), 1e-30),
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / 1e6, -np.inf, room / 1e6)],
            options={"time_limit": MOST_SECONDS, "mip_rel_gap": 1e-3},
        )
    if found.x is None:
        return {}
    chosen = {tensor: name for (tensor, name), taken in zip(options, found.x, strict=True) if taken > 0.5}
    is_whole = len(chosen) == len(losses) and sum(losses[key].nbytes(name) for key, name in chosen.items()) <= room
    return chosen if is_whole else {}


def _stepwise(losses: Mapping[str, Loss], room: float) -> dict[str, str]:
    """From the smallest types on, the exchange of one tensor's type that saves most for each byte, while one fits."""
    chosen = {
        tensor: min(loss.kl, key=lambda name: (loss.nbytes(name), loss.kl[name])) for tensor, loss in losses.items()
    }
    left = room - sum(losses[tensor].nbytes(name) for tensor, name in chosen.items())

    def best_of(tensor: str) -> tuple[float, str, int]:
        loss, now = losses[tensor], chosen[tensor]
        found = [
            ((loss.kl[now] - kl) / more, name, more)
            for name, kl in loss.kl.items()
            if 0 < (more := loss.nbytes(name) - loss.nbytes(now)) <= left
        ]
        return max(found, default=(0.0, now, 0))

    while True:
        (saved, name, more), tensor = max((best_of(tensor), tensor) for tensor in chosen)
        if saved <= 0:
            return chosen
        chosen[tensor] = name
        left -= more


def bits_of(chosen: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], names: Sequence[str] = ()) -> float:
    """Bits a weight of all matrices, or of those named."""
    of = [name for name in (names or chosen) if len(shapes[name]) > 1]
    nbytes = sum(shapes[name][0] * GGUF_BY_NAME[chosen[name]].row_bytes(shapes[name][1]) for name in of)
    return 8 * nbytes / sum(shapes[name][0] * shapes[name][1] for name in of)
