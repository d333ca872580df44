"""What an optimizer did: read from the weights, gradients and settings around its own steps."""
