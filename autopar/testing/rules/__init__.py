"""Proves every row of the rule table against the operator itself, rank by rank."""
