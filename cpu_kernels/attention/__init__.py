"""Attention over pages of keys and values, and the rotary embedding that fills them."""
