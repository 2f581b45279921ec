"""Settings of flags, each declared once."""
