"""Decoders that follow a flow from noise to pixels, and what they read of tokens."""
