"""Helpers that the tests of `mergevq.tokenizer.quantizers.lfq` share."""

import torch


def random_indices(shape, num_bits, generator):
    # Below 2**63 - 1, the largest that randint takes; the last code is put in by hand.
    indices = torch.randint(min(2**num_bits, 2**63 - 1), shape, generator=generator)
    indices[..., 0] = 2**num_bits - 1
    return indices
