"""Training of decoders for tokenizers that stay as they are."""
