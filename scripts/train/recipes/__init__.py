"""Recipes that train the demo pipelines, one file per model; `train_demo.py` runs them."""
