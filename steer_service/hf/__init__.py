"""Transformers: the embedded model, and models that are run or trained outside the engine."""
