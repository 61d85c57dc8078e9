"""Calls that come at any time and from anywhere."""
