"""Tests of the runtime and of the command line."""
