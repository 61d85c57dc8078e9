"""What a command has around it: the streams of its shell, Python's collector, a process beside it."""
