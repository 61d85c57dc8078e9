"""What a pass stands on: the memory that it writes, and what a failed one leaves behind."""
