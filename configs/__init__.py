"""The configurations that ship with the package: `-c NAME` finds them."""
