"""Processes, signals, files that are whole or not there, tensors on disk."""
