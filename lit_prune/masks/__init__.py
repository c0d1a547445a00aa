"""Masks that are learned while the weights are frozen."""
