"""The GPU side of the lanes: a `Device` (budget, streams, events) over a driver, which is the only part that differs.

arena.py     bytes in use by kind, under a hard budget
device.py    what the lanes call; protocols.py: what every driver offers
emulated.py  the driver of a machine without a GPU
cuda.py      the driver of a CUDA device; slab.py: places in its one allocation; libcuda.py: what torch lacks
machine.py   what planning must know of a GPU in this machine
"""

from hetero_attn.devices.arena import Arena
from hetero_attn.devices.cuda import CudaDriver
from hetero_attn.devices.device import Device
from hetero_attn.devices.emulated import EmulatedDriver

__all__ = ["Arena", "CudaDriver", "Device", "EmulatedDriver"]
