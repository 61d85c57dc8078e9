"""Why a plan is as fast as it is: the bottleneck, what would help, and what was considered and rejected."""
