"""Figures that every room may draw: the style, and those of a path."""
