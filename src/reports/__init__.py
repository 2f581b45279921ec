"""HTML pages, pictures and plain-text tables."""
