"""What matters: pure functions from weights and statistics to a score for each unit."""

from lit_prune.scores.wanda import column_scores

__all__ = ["column_scores"]
