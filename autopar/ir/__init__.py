"""The graph of a model, and the values that describe it."""
