"""Training what is left: adapters, teachers and their losses."""
