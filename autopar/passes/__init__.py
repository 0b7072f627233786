"""Graph rewrites: from a plan to the program each rank runs."""
