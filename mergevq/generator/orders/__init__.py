"""Orders in which tokens are generated."""
