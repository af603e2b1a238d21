"""Facts about the edges of a Graph, by abstract interpretation. They may lose precision, never soundness."""
