"""Mixtures of experts against transformers, on every lane and from every kind of file."""
