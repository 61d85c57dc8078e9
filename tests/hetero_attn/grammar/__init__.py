"""Answers that follow a grammar: what is allowed, and what is forced and so costs no pass."""
