"""Planted bugs of the Triton kernels, a table for each kind of op; each names the check that must fail."""
