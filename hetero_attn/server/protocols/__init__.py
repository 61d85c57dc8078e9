"""One file a protocol: its body in, a turn out; pieces of the answer in, its events out."""
