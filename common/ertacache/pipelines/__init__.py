"""Plans in stock diffusers pipelines."""
