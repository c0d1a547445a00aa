"""Pruning a model larger than memory."""
