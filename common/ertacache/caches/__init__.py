"""Other caches, to compare with: diffusers' own, cache-dit's, and those that exist only as edits of a model's source.

Each is a context manager around the calls of a stock diffusers pipeline. Those written here use diffusers' hook
registry: they change no model, and the pipeline's own cache context tells them the guidance branch.
"""
