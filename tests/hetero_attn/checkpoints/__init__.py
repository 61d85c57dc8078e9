"""Tests of files of weights, sound and broken."""
