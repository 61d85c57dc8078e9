"""Sizes that the elementwise kernels and their wrappers share."""

SILU_UNITS = 64  # units of 16 outputs handed out at a time
GELU_FEATURES = 512  # of a row at a time
COPY_FEATURES = 1024  # of a row at a time
MERGE_ROWS = 16  # rows merged per chunk
GATHER_FEATURES = 1024  # of a row at a time
