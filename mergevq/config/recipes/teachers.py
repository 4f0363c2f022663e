"""Frozen vision models that recipes name, at fixed commits."""

DINOV2_BASE = "facebook/dinov2-base@f9e44c814b77203eaa57a6bdbbd535f21ede1415"
DINOV2_SMALL = "facebook/dinov2-small@ed25f3a31f01632728cabb09d1542f84ab7b0056"
"""Encoders of versions G and G+R start from these by weight selection; d32 is as wide as ViT-S."""
