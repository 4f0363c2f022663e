"""Evaluations of tokenizers and generators."""
