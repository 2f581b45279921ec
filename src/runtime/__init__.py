"""Processes, signals, atomic file writes, image files, and tensors on disk."""
