"""Statistics over runs that generalise late: onsets, leads, lifetimes and scaling."""
