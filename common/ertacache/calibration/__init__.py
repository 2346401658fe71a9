"""How plans are learned: from a model folder's loop, or from a pipeline's own call."""
