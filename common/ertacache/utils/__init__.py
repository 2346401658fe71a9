"""Errors, files, processes, devices, provenance, media, checkpoints: what every package uses."""
