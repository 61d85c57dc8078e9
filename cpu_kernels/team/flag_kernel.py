"""Flags in memory that another thread, or a GPU, reads and writes: set one, wait for one, without Python's lock."""

from cpu_kernels.team.flag_words import ADDRESS, EXPIRED, NAP_US, NAPS, SPINS, VALUE, YIELDS
from cpu_kernels.vectors.compiler import helper
from cpu_kernels.vectors.scalar import load_acquire, load_i64, pause, sleep_us, store_i64, store_release, yield_core


@helper
def comes(address, value, naps):
    """Wait for the flag to be `value`, spinning, then yielding, then napping; False where the naps run out before."""
    spins = 0
    while load_acquire(address) != value:
        spins += 1
        if spins <= SPINS:
            pause()
        elif spins <= SPINS + YIELDS:
            yield_core()
        elif spins <= SPINS + YIELDS + naps:
            sleep_us(NAP_US)
        else:
            return False
    return True


def set_flag():
    """Arguments: a block as in flag_words.py. Everything written before is visible to whoever sees the value."""

    def kernel(block, _):
        store_release(load_i64(block + VALUE), load_i64(block + ADDRESS))

    return kernel


def await_flag():
    """Arguments: a block as in flag_words.py; EXPIRED becomes 1 where the naps run out before the value is there."""

    def kernel(block, _):
        came = comes(load_i64(block + ADDRESS), load_i64(block + VALUE), load_i64(block + NAPS))
        store_i64(0 if came else 1, block + EXPIRED)

    return kernel
