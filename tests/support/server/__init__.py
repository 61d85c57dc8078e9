"""Servers of the shipped model, and what clients send."""
