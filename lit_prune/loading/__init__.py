"""How a model gets into memory."""
