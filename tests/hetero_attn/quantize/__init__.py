"""`quantize`: blocks, the choice of their types, and the files that are written."""
