"""Tests of the lanes and of their timeline."""
