"""A decoder as a sequence of operations, and its rotary tables."""
