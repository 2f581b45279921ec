"""What flags may be, each declared once."""
