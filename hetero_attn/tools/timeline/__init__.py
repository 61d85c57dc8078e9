"""A timeline without the machine: what a step queues, recorded with empty tensors and run by a machine's rates."""
