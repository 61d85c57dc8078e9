"""Placements improved by what no program knows: memory that whole units leave idle, and expert slots."""
