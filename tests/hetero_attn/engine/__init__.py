"""Tests of a loaded model's steps."""
