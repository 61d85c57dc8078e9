"""Tests of whole processes and of what surrounds them."""
