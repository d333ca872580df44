"""Text in, probed batches out."""
