"""Whose turn it is: requests queued and admitted, prompts cut into chunks, and threads that take steps in turns."""
