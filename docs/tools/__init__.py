"""Scripts that make the repository's own pages and assets."""
