"""Geometry of a weight trajectory: numerics on tensors, with no knowledge of models, stories or trainers."""
