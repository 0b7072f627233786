"""Proof of the rule table by machine: every row against the op itself, rank by rank."""
