"""Operators of graphs that torch lacks, with their kernels and derivatives."""
