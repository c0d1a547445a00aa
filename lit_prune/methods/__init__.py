"""Scores of a model's units by each method (formulas: `lit_prune.scores`)."""
