"""Models that were quantised elsewhere: each form of a file by its own writer, and files that contradict themselves."""
