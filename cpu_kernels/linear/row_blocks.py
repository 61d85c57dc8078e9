"""Kernels that make packed weights of rows: blocks of sixteen rows, which the threads of a team take one by one."""

from collections.abc import Callable

from cpu_kernels.formats import BLOCK_FEATURES
from cpu_kernels.team.arguments import PACK
from cpu_kernels.team.chunks import fail, parameter, take


def over_blocks(write_block: Callable, memory: Callable) -> Callable:
    """Kernel. write_block(rows, row_bytes, row_items, to, memory): a block of sixteen rows that are row_bytes apart;
    False where a number in them is not finite, which fails the call. memory: what a thread works in."""

    def kernel(arguments, thread):
        rows, stride, num_blocks = (
            parameter(arguments, PACK.rows),
            parameter(arguments, PACK.row_bytes),
            parameter(arguments, PACK.num_blocks),
        )
        row_items, out, block_bytes = (
            parameter(arguments, PACK.row_items),
            parameter(arguments, PACK.out),
            parameter(arguments, PACK.block_bytes),
        )
        scratch = memory()
        block = take(arguments, 0)
        while block < num_blocks:
            source = rows + block * BLOCK_FEATURES * stride
            if not write_block(source, stride, row_items, out + block * block_bytes, scratch):
                fail(arguments, 1)
            block = take(arguments, 0)

    return kernel
