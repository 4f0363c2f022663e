"""MergeVQ: discrete, variable-length image tokens for generation and representation.

Nothing is imported here, so `mergevq --help` does not load torch. The module is the namespace:
`from mergevq.tokenizer import Tokenizer`.
"""
