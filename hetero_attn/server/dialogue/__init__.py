"""Conversations, free of any protocol: messages as chat templates want them, answers as text, reasoning and calls."""
