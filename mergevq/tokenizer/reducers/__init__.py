"""Ways from grid tokens to kept tokens."""
