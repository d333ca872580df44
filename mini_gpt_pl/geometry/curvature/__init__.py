"""Second derivatives and their stand-ins: Fisher matrices and commutators of steps."""
