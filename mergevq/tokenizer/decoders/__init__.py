"""Ways from the grid to an image."""
