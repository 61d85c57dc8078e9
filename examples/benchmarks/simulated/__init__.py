"""Machines with a GPU where there is none: what is queued for one, and how long it would take."""
