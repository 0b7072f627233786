"""Process groups, collectives, and what they cost."""
