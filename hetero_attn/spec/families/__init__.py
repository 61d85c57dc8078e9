"""The decoder families, each one declaration: what its config leaves unsaid, and what it computes beside Llama."""
