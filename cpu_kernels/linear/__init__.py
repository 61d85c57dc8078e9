"""Rows of activations times one packed weight, and the packing of weights."""
