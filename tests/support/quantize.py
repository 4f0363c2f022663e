"""Helpers that the tests of quantizers share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOW_PRECISION = [torch.bfloat16, torch.float16]


def random_indices(shape, num_bits, generator):
    # Below 2**63 - 1, the largest that randint takes; the last code is put in by hand.
    indices = torch.randint(min(2**num_bits, 2**63 - 1), shape, generator=generator)
    indices[..., 0] = 2**num_bits - 1
    return indices


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation makes."""

    num_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_entries = max([self.num_entries, *sizes])
        return result


def sharp_and_soft_latents(num_tokens, num_bits, temperature, generator):
    """From undecided to fully decided bits: log-odds of 4 z / t between about -30 and 30."""
    latents = torch.randn(num_tokens, num_bits, generator=generator)
    scales = torch.logspace(-2, 1, num_tokens)[:, None]
    return temperature * latents * scales


def value_and_gradient(function, latents, *arguments):
    latents = latents.clone().requires_grad_()
    value = function(latents, *arguments)
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    return value.detach(), gradient
