"""Directions and subspaces of weight space, made of a path or given."""
