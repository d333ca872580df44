"""What a run found, as a table and as figures."""
