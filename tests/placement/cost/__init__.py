"""Tests of what operations and passes are said to cost."""
