"""Heads that draft from what a large model has computed."""
