"""Search of a user's own images: image files, index, stores, searcher, and the page."""
