"""A tokenizer as graphs that run without this package."""
