"""Other people's caches, written anew where they exist only as edits of a model's source, to compare with.

Each is a context manager around calls of a stock diffusers pipeline. They work through diffusers' hook registry, so
that they need no change of a model and are told the guidance branch by the pipeline's own cache context.
"""
