"""Tests of the GPU kernels and of their oracle."""
