"""What a new GGUF file says beside its weights: the model and its tokenizer."""
