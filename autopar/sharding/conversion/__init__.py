"""The cheapest collectives from one layout to another."""
