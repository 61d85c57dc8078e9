"""Sizes that the routing kernels and their wrappers share."""

EXPERTS_AT_ONCE = 16  # router rows in a chunk; a router is padded to whole ones
ROWS_AT_ONCE = 8  # rows of x that read them from the first cache levels
BIAS_FEATURES = 512  # of an expert, added to all its places per chunk
COMBINE_FEATURES = 256  # features of a row combined per chunk
