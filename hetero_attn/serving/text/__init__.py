"""Text to token ids and back: a model's tokenizer, how it is opened, and text as it streams."""
