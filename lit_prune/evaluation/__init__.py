"""What is left of a model: perplexity, tasks, size and speed."""
