"""A workload, the plan that places it, the bytes that the plan takes, and the forms in which it is shown."""
