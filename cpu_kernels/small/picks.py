"""What kernels read of the picks of experts: `starts`, int32, the place where an expert's picks begin, and one more.

Memory contents, so that a recorded call follows whatever the router has written.
"""

from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import load_i32, most


@helper
def expert_of(starts, first, count, place):
    """The expert of [first, first + count) whose picks hold `place`, which lies in theirs."""
    low, high = first, first + count
    while high - low > 1:
        middle = (low + high) // 2
        if load_i32(starts + 4 * middle) <= place:
            low = middle
        else:
            high = middle
    return low


@helper
def busy_experts(starts, first, count):
    """How many experts have picks, and the most picks of one."""
    busy, largest = 0, 0
    for e in range(first, first + count):
        picks = load_i32(starts + 4 * e + 4) - load_i32(starts + 4 * e)
        busy += 1 if picks else 0
        largest = most(largest, picks)
    return busy, largest


@helper
def busy_expert(starts, e, before):
    """Of the experts from e on that have picks, the one that `before` others come before; there is one."""
    left = before + 1
    while True:
        left -= 1 if load_i32(starts + 4 * e + 4) != load_i32(starts + 4 * e) else 0
        if not left:
            return e
        e += 1
