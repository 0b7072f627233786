"""Local implementations of split ops for which the op on the shards alone is not correct.

Each takes the op's own arguments with local tensors, and `shard`: for every split factor
`(start, length, size, groups)`: this rank's part of the factor, its global extent, and the names of
the communicators it is split over, outermost first. One that asks for `shapes` gets the global
shapes of the tensor operands. Random ops also get `seed` (an int64 scalar
tensor) and `stream` (op number, shard number), which select the random numbers.
"""
