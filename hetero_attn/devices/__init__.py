"""The GPU side of the lanes: a `Device` (budget, streams, events) over a driver, which is the only part that differs.

arena.py     bytes in use by kind, under a hard budget
device.py    what the lanes call; says what every driver offers
emulated.py  the driver of a machine without a GPU
"""

from hetero_attn.devices.arena import Arena
from hetero_attn.devices.device import Device
from hetero_attn.devices.emulated import EmulatedDriver

__all__ = ["Arena", "Device", "EmulatedDriver"]
