"""Effects of wrong tokens and wrong maps on images, and how they go with generation."""
