"""Ops that are several in one launch, with the bits of the several."""
