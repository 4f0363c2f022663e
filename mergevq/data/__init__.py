"""Images and tokens, as values and as files."""
