"""Helpers of the tests: oracles, toy models, simulated devices."""
