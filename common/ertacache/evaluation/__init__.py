"""Measuring: methods, rows, metrics, latency, ranking, reports."""
