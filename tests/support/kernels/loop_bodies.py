"""Assembly of kernels as counts of instructions, block by block between two labels: what an inner loop is made of."""

import re
from collections import Counter


def linear_kernel(weight_dtype: str, tile: int):
    """The linear of a coded format, as cross_compile takes it."""
    return ("linear.q_kernel", "linear_q", "ISA", weight_dtype, tile)


def blocks_of(assembly: str) -> list[Counter]:
    """How often each instruction stands in every block."""
    blocks = re.split(r"(?m)^\S+:.*$", assembly)
    return [Counter(re.findall(r"(?m)^\t([a-z]\w*(?:\.\d*[bhsd])?)", block)) for block in blocks]


def busiest_block(assembly: str, instruction: str) -> Counter:
    """The block that has most of what begins with the name of an instruction."""
    return max(
        blocks_of(assembly), key=lambda block: sum(block[name] for name in block if name.startswith(instruction))
    )
