"""A user's own images: files, index, vectors, searcher, dialogue."""
