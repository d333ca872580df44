"""Small GPTs with a hidden key-retrieval probe, and the geometry of the path that training takes."""
