"""Errors that tests plant."""
