"""Workloads, machines and slow searches for tests of plans."""
