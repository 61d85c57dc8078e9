"""Sizes beyond those of any real model: refused before memory is sized by them."""

MAX_LAYERS = 1024
MAX_VOCAB = 1 << 22
MAX_HIDDEN = 1 << 18
MAX_INTERMEDIATE = 1 << 20
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 10
MAX_CONTEXT = 1 << 25
