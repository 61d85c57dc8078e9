"""What other projects hold their servers and clients to, restated: one file a suite, each naming where it comes from."""
