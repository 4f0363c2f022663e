"""Quantizers of all cells of a grid at once, which lay out tokens of their own."""
