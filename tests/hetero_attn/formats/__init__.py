"""Tests of weight formats that a policy or a recipe chooses."""
