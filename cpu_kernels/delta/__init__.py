"""Gated DeltaNet between the projections of a layer: what a token does to its sequence's state, and reads of it."""
