"""What a tile of keys is multiplied by, as registers: dot products of queries with K, and weighted sums of V."""
