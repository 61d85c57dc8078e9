"""Tests of verify, quality and traces."""
