"""Predicts what every operator of a graph computes, moves and saves; measures machines."""

from autopar.profiler.model import ModelProfile, largest, profile_model, substitute
from autopar.profiler.profile import NodeProfile, profile_graph

__all__ = ["ModelProfile", "NodeProfile", "largest", "profile_graph", "profile_model", "substitute"]
