"""Tests of kernels as machine code, and of how they are launched."""
