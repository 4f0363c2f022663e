"""Terms of the tokenizer's loss."""
