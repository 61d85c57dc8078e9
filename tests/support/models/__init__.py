"""Toy models, and engines over them."""
