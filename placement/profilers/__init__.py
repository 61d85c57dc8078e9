"""Measuring a machine's rates with the kernels themselves; the only part that imports them."""
