"""Tests of the house: sizes, imports, words, documents and the package."""
