"""Programs that tests start, and the command line."""
