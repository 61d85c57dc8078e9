"""A loaded model that computes steps: built, warmed up, recorded, moved to other plans, and measured."""
