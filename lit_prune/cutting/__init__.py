"""From scores to a smaller model."""
