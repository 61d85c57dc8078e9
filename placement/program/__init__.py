"""A small mixed-integer linear program, and the solver that prints nothing."""
