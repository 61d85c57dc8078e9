"""Draws of one token: which are kept, and how a grammar is asked about few of them."""
