"""From workload, machine and policy to the best placement, as a mixed-integer program."""
