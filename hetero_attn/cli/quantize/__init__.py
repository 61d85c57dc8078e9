"""`hetero-attn quantize`: a model to a GGUF file."""
