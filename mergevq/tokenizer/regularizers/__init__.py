"""Ways to change codes between quantizer and expander, in training alone."""
