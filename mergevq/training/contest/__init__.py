"""Comparisons of tokenizers that are trained alike."""
