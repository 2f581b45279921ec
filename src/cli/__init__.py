"""Every shared flag; device, benchmark and resumed run from flags; what submission scripts do."""
