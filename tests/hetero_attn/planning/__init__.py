"""Tests of wishes that become plans, and of the machine's profile."""
