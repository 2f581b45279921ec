"""OpenMoji's pictures and their meaning, and triplets of pictures that differ in one or two facts."""
