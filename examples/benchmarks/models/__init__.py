"""Models of random weights and known shapes, as files: something to time."""
