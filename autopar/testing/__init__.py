"""Tools for development and tests: proofs of the sharding rules, simulated ranks, live memory."""
