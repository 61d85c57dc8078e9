"""Families with experts whose layers have more than a router and experts of their own."""
