"""Tests of routing and of linears over chosen experts."""
