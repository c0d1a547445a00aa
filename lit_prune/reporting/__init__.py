"""What a run leaves to read: the report, its table, and the model card."""
