"""Tests of requests, sampling and text."""
