"""The operations of the contract, which every lane has."""

import inspect

from cpu_kernels.contract import Ops

OPS = tuple(name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_"))
