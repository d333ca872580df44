"""The report on runs of modular arithmetic, beside the published values of the studies."""
