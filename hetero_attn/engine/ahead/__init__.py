"""What a load prepares, so that the first answer compiles nothing: CPU kernels, GPU kernels, the first steps."""
