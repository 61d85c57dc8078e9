"""Panels of rows times ranges of blocks of coded weights, as they lie, spread to bytes, or made float32."""
