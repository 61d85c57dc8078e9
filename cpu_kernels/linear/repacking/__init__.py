"""Coded rows of a file into packed blocks: where each type has its codes and scales, and the kernel made of it."""
