"""Flags in memory that another thread, or a GPU, reads and writes: set one, wait for one, without Python's lock."""

from .flag_layout import ADDRESS, EXPIRED, NAP_US, NAPS, SPINS, VALUE, YIELDS
from .scalar import load_acquire, load_i64, pause, sleep_us, store_i64, store_release, yield_core


def set_flag():
    """Arguments: a block as in flag_layout.py. Everything written before is visible to whoever sees the value."""

    def kernel(block, _):
        store_release(load_i64(block + VALUE), load_i64(block + ADDRESS))

    return kernel


def await_flag():
    """Arguments: a block as in flag_layout.py; EXPIRED becomes 1 where the naps run out before the value is there."""

    def kernel(block, _):
        address, value, naps = load_i64(block + ADDRESS), load_i64(block + VALUE), load_i64(block + NAPS)
        spins = 0
        store_i64(0, block + EXPIRED)
        while load_acquire(address) != value:
            spins += 1
            if spins <= SPINS:
                pause()
            elif spins <= SPINS + YIELDS:
                yield_core()
            elif spins <= SPINS + YIELDS + naps:
                sleep_us(NAP_US)
            else:
                store_i64(1, block + EXPIRED)
                return

    return kernel
