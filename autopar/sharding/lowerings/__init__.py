"""Local implementations of ops whose split needs more than local execution.

Each takes the op's own arguments with local tensors, and `shard`: for every split factor
`(start, length, size, groups)`: this rank's part of the factor, its whole extent, and the names of
the communicators it is split over, outermost first. Random ops also get `seed` (an int64 scalar
tensor) and `site` (op number, shard number).
"""
