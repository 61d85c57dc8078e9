"""Tests of the small operations."""
