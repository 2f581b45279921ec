"""Every shared flag, and what scripts do with flags before their own work."""
