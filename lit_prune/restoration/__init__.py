"""What makes up for a cut, without training."""
