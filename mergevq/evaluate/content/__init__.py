"""Evaluations of what pictures are of: text that can be read, masks that cover the same pixels."""
