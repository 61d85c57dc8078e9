"""Tests that need a CUDA device, or run emulated beside it."""
