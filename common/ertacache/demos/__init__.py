"""The embedded demos: their scenes, and the contract of a model folder."""
