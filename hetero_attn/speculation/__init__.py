"""Speculative decoding: who drafts tokens, how many at once, and what became of them."""
