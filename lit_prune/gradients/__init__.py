"""Gradients for scores: by backward passes, of low rank, or from forward passes alone."""
