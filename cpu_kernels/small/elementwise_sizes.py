"""Sizes that the elementwise kernels and their wrappers share."""

SILU_UNITS = 64  # units of 16 outputs handed out at a time
MERGE_ROWS = 16  # rows merged per chunk
MERGE_FIRST = 6  # parameter index of the first partial's (out, lse) addresses
MERGE_PARTS = 14  # partials per call that fit in the parameters
