"""Predicts what every operator of a graph computes, moves and saves; measures machines."""
