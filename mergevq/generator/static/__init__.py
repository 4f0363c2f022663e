"""Decoding in steps of one shape."""
