"""Argument checks of the wrappers: a kernel trusts its addresses, so nothing wrong may reach one."""

import torch


def expect(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype | tuple, shape: tuple) -> None:
    """A CPU tensor of this dtype and shape (None: any size) whose last dimension is contiguous; else ValueError."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(str(item) for item in dtypes)}")
    if tensor.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, tensor.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}]")
    if tensor.shape and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be contiguous there")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the CPU kernels need it in host memory")
