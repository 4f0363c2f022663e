"""Tokens from a class, one after the other."""
