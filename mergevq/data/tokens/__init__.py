"""Encoded images: as files, as rows of them, and as batches."""
