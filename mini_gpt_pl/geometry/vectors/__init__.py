"""Flat vectors of selected weights: their order, files, products and alignments."""
