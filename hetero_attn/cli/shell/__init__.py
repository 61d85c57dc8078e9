"""The shell that a command was started from: its streams."""
