"""Argument checks of the wrappers: a kernel trusts its addresses, so nothing wrong may reach one."""

import struct

import torch


def expect(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype | tuple, shape: tuple) -> None:
    """A CPU tensor of this dtype and shape (None: any size) whose last dimension is contiguous; else ValueError.

    Every op of every layer comes through here, so the usual case is decided by four attribute reads.
    """
    have = tensor.shape
    fits = have == shape or _fits(have, shape)
    right_dtype = tensor.dtype in dtype if isinstance(dtype, tuple) else tensor.dtype is dtype
    if not (fits and right_dtype and tensor.is_cpu and (not have or have[-1] <= 1 or tensor.stride(-1) == 1)):
        _explain(name, tensor, dtype if isinstance(dtype, tuple) else (dtype,), shape, fits)


def _fits(have: tuple, shape: tuple) -> bool:
    if len(have) != len(shape):
        return False
    for want, size in zip(shape, have):  # a generator would cost a call for every dimension
        if want is not None and want != size:
            return False
    return True


def _explain(name: str, tensor: torch.Tensor, dtypes: tuple, shape: tuple, fits: bool) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; the CPU kernels need it in host memory")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(str(item) for item in dtypes)}")
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}]")
    raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be contiguous there")


def bits_of(value: float) -> int:
    """A float64's bits as int64, the form in which a kernel takes it."""
    return struct.unpack("=q", struct.pack("=d", value))[0]
