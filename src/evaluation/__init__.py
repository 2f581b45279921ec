"""Compose and rank, result files, rankings files, comparisons, submissions."""
