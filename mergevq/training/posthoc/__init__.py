"""Stages after training, which change a tokenizer without a step of an optimizer."""
