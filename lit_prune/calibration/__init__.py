"""Calibration tokens, and what is measured of a model on them."""
