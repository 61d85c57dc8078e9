"""GGUF files: a bounded reader, the config, tensors and tokenizer that they hold."""
