"""Running a graph: step functions, the cache, generation."""
