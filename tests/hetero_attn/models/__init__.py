"""Tests of whole models against transformers."""
