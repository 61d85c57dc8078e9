"""Requests from text to tokens and back: tokenizer, scheduler, sampling, progress."""
