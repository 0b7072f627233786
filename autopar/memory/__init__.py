"""The memory scheduler: what a step keeps, what it computes again, and in which order it runs."""
