"""Heads that draft for a larger model: what their configs say, and what their files are called."""
