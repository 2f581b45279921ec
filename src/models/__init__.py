"""CLIP models and their features, checkpoints and their settings, the trained pair, and the router of a mixture."""
