"""Tests of the scripts and the checkpoints under `examples/`."""
