"""Distributions of one token, given the state of the transformer."""
