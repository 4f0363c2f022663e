"""Image to tokens, and back."""
