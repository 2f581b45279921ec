"""Where the features of an index live."""
