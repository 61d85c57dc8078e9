"""From a model and wishes to a plan; reads kept profiles and never measures."""
