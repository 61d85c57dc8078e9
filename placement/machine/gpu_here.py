"""Whether this machine has a GPU that torch can use, found out without torch where there cannot be one."""

import ctypes
import sys

DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


def has_gpu() -> bool:
    """Whether torch can use a GPU here. Importing torch takes over a second, so it is asked only where it is there
    already or where there is a driver."""
    if "torch" not in sys.modules and not has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def has_driver() -> bool:
    """Whether the library of a GPU's driver can be loaded; without one torch finds no GPU."""
    for name in DRIVER_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
