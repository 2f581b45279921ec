"""HTML pages, pictures, and tables as text."""
