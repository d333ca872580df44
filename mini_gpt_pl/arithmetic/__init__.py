"""The second task: classification of residues by a small encoder, which memorises first and generalises late."""
