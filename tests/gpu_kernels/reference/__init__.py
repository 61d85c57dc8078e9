"""Tests of the ops in plain torch, the oracle of both kernel packages."""
