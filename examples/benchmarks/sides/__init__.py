"""The sides of a comparison, each a process of its own that is driven by lines, and what is compared."""
