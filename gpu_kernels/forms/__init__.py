"""The coded formats of GGUF files: their slow reading, which is the oracle, and their way to bf16 on a GPU."""
