"""Panels of rows times ranges of blocks: coded weights as they lie, spread to bytes, or made float32; bf16 turned."""
