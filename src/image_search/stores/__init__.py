"""Stores for the features of an index."""
