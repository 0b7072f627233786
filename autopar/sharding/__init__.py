"""Which layouts an operator allows, and what it takes to convert between them."""
