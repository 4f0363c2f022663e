"""Source maps and tokens as streams of bits: a range coder, and what it predicts them from."""
