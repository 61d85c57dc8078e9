"""The hand-overs that may be asked for, by name; `handover_choice` says what each is."""

HANDOVERS = ("auto", "events", "flags", "graph")
