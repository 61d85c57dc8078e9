"""Tests of weights on their way from the file into each home."""
