"""Helpers that the tests of `mergevq.nn.blocks` share."""

import torch
from torch import nn

from mergevq.tokenizer.reducers.merge import MergeState


def randomized(module):
    """Weights large enough that every part of a module shows in its output."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def unmerged(batch, num_tokens):
    return MergeState(index=torch.arange(num_tokens).expand(batch, -1), sizes=None)
