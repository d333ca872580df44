"""The commands with a trainer, strategies and optimizers."""
