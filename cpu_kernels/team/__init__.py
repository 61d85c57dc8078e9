"""The team of threads, the programs it runs, the chunks it shares out, and the store of compiled kernels."""
