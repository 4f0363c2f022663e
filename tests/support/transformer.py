"""Helpers that the tests of `mergevq.nn.llama` share."""

from mergevq.nn.llama import Block


def block(**changes):
    settings = {"dim": 16, "hidden_dim": 24, "num_heads": 4, "key_heads": 4, "qk_norm": False}
    return Block(**(settings | {"dropout": 0.0} | changes))
