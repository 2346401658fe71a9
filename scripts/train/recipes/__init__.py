"""Recipes that train the demo pipelines, one file a model; `train_demo.py` is their command line."""
