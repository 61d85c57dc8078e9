"""Panels of rows times ranges of blocks of coded weights, as they lie or spread to bytes."""
