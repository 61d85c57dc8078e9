"""What a model is: its config, its tensors by name, its linears by unit; no tensors, no devices."""
