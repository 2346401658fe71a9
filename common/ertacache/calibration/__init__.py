"""Calibration of plans, from a model folder's loop or from a pipeline's own call."""
