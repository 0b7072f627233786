"""Training libraries on autopar's engines, against the same libraries on one process."""
