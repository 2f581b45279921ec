"""The pictures of OpenMoji, what each shows, and triplets of two that differ in something."""
