"""Tests of keys, values and states that are kept."""
