"""Tests of linears and of the formats of their weights."""
