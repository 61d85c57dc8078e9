"""Quantising a model to a GGUF file: scales fitted to the weights, and formats chosen by what they cost on a text."""
