"""Weights from the file straight into their homes: read unit by unit, checked, packed, landed."""
