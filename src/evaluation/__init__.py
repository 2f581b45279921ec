"""Compose and rank queries, write and compare results, write rankings, submissions and model cards."""
