"""Plans that follow a loaded one: other GPU budgets, longer contexts, measured lane times."""
