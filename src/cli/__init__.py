"""Flags that scripts share: their declaration, parsing and checks."""
