"""Requests from a prompt to its answer: scheduler, turns, sampling, grammar, progress."""
