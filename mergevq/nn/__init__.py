"""Blocks of networks without a method of their own."""
