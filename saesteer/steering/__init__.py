"""Edits to a model's activations: what, where, how, and what happened."""
