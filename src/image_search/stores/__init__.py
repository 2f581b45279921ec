"""Stores of the features of an index."""
