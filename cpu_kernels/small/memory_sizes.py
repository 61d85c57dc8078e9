"""Sizes that the memory kernels and their wrappers share."""

SWEEP_BYTES = 512 << 10  # bytes read per chunk
