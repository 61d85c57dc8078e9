"""Mixtures of experts on the GPU lane: routing, and the sum over the experts of a row."""
