"""Vectors, scalars and dot products as LLVM instructions, for every instruction set."""
