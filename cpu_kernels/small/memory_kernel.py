"""sweep: read memory and do nothing else, as fast as the cores can; what the other kernels are compared with."""

from cpu_kernels.small.memory_sizes import SWEEP_BYTES
from cpu_kernels.team.arguments import SWEEP
from cpu_kernels.team.chunks import parameter, take
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import least
from cpu_kernels.vectors.vector import exclusive_or, load_line, prefetch, store_line


@helper
def sweep_range(at, stop):
    """Exclusive-or of all whole 512-byte pieces in [at, stop)."""
    a, b, c, d = load_line(at), load_line(at + 64), load_line(at + 128), load_line(at + 192)
    while at + 512 <= stop:
        prefetch(at, 4096)
        prefetch(at, 4160)
        prefetch(at, 4224)
        prefetch(at, 4288)
        prefetch(at, 4352)
        prefetch(at, 4416)
        prefetch(at, 4480)
        prefetch(at, 4544)
        a, b = exclusive_or(a, load_line(at)), exclusive_or(b, load_line(at + 64))
        c, d = exclusive_or(c, load_line(at + 128)), exclusive_or(d, load_line(at + 192))
        a, b = exclusive_or(a, load_line(at + 256)), exclusive_or(b, load_line(at + 320))
        c, d = exclusive_or(c, load_line(at + 384)), exclusive_or(d, load_line(at + 448))
        at += 512
    return exclusive_or(exclusive_or(a, b), exclusive_or(c, d))


def sweep():
    """Kernel; scratch: a line per thread. size: at least 512."""

    def kernel(arguments, thread):
        address, size = parameter(arguments, SWEEP.address), parameter(arguments, SWEEP.size)
        chunk = take(arguments, 0)
        while chunk * SWEEP_BYTES < size:
            stop = least(size, (chunk + 1) * SWEEP_BYTES)
            if stop - chunk * SWEEP_BYTES >= 512:
                line = sweep_range(address + chunk * SWEEP_BYTES, address + stop)
                store_line(line, parameter(arguments, SWEEP.scratch) + 64 * thread)
            chunk = take(arguments, 0)

    return kernel
