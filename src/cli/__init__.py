"""Every shared flag; device, benchmark and resumed run from flags; what both submission scripts do."""
