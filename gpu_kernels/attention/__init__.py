"""Attention over the pages of the KV cache, of decode rows and of prompts, and the merge of what its parts give."""
