"""Tests of attention on the CPU."""
