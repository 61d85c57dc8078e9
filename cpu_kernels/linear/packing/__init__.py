"""Rows of numbers into packed blocks: how scales are searched for, and the kernel made of it."""
