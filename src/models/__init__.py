"""CLIP, its features, what a checkpoint says of itself, the trained pair, the router."""
