"""First weights that are computed, not drawn: principal components of patches."""
