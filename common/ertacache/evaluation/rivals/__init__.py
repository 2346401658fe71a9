"""Rivals that spend the same number of model calls on other steps or with other weights, for scripts/evaluate.py."""
