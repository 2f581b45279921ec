"""A user's own images: files, index, stores, searcher, the page."""
