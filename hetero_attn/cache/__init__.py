"""Keys and values: pages, the memory they are in, their moves, and the prefixes that are remembered."""
