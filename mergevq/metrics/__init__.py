"""Numbers of images and of codes."""
