"""Coded formats in a linear: their codes as registers, and the step that multiplies 64 inputs of them."""
