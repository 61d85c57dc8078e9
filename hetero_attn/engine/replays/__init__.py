"""Decode steps recorded once and replayed for every token: as a program of the CPU lane, or beside a CUDA graph."""
