"""How long a placement takes: operations, passes, and the objective that is minimised."""
