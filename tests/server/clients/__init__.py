"""Tests of the clients that people have, and of the page."""
