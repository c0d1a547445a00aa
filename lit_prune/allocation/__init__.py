"""How much of a model goes, and from which layers."""
