"""The block of int64 through which set_flag and await_flag get their arguments, and how await_flag waits."""

ADDRESS, VALUE, NAPS, EXPIRED = 0, 8, 16, 24
BLOCK_BYTES = 32
SPINS = 2000  # some 40 us of pause
YIELDS = 5000  # then some ms of sched_yield: longer than a GPU takes for its share of a layer
NAP_US = 50
NAPS_AT_ONCE = 100  # then Python looks at the clock: naps are longer where the machine is busy
