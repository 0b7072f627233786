"""Development tools: proofs of the sharding rules."""
