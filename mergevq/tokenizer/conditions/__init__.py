"""Conditions: what is known of an image besides its tokens, as encoder and decoder see it."""
