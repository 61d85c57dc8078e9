"""Weights that have one type together: of a layer's experts all gates, all ups and all downs are one tensor of a file.

A stack goes by the name of its weights with a star for the expert's number; every other weight is a stack of its own.
"""

import re
from collections.abc import Iterable, Mapping

from cpu_kernels.formats import GGUF_BY_NAME
from hetero_attn.checkpoints.gguf.names import their_name
from hetero_attn.checkpoints.gguf.writer import NewTensor

_EXPERT = re.compile(r"\.experts\.\d+\.")
_ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")


def stack_of(name: str) -> str:
    """The stack that a weight belongs to."""
    return _EXPERT.sub(".experts.*.", name)


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights of every stack, in the order in which they are given."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stack_of(name), []).append(name)
    return found


def bits_of_type(name: str) -> float:
    """Bits a weight of a type."""
    return 8 * GGUF_BY_NAME[name].block_bytes / GGUF_BY_NAME[name].items


def is_router(name: str) -> bool:
    """Whether a matrix is one that routes, which is always float32."""
    return name.endswith(_ROUTERS)


def spread(types: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The types of those of the weights whose stacks have one in `types`."""
    return {name: types[stack_of(name)] for name in names if stack_of(name) in types}


def new_tensor(names: list[str], kind: str, shape: tuple[int, ...]) -> NewTensor:
    """A stack as the file has it. shape: of one of its weights; the factor of a shared expert is a vector there."""
    name, is_stacked = names[0], _EXPERT.search(names[0]) is not None
    if is_stacked:
        theirs = their_name(_EXPERT.sub(".", name)).replace(".weight", "_exps.weight")
        return NewTensor(theirs, GGUF_BY_NAME[kind], (len(names), *shape))
    return NewTensor(their_name(name), GGUF_BY_NAME[kind], shape[1:] if "shared_expert_gate" in name else shape)
