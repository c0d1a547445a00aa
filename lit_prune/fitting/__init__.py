"""What a fit needs around a model that changes its shape: ranks, checkpoints, resuming."""
