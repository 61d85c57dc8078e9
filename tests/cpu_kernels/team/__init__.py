"""Tests of the thread team, of programs, and of kernels on their way to machine code."""
