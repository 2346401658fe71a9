"""Errors, files, processes, devices, provenance, media, checkpoints, tables: utilities of every package."""
