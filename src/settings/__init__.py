"""Settings of the scripts, each declared once."""
