"""OpenMoji's pictures with their attributes, and triplets of pictures that differ in one or two attributes."""
