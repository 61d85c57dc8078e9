"""The tests, in folders like the code; helpers are in `support`."""
