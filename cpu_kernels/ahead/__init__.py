"""Kernels compiled before they are called, in several processes at once."""
