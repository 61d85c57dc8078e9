"""Oracles of kernels, and their inputs."""
