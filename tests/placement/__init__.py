"""Tests of planning without a model."""
