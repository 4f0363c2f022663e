"""Attention by the kernel that is fastest where it runs.

Shape letters: B batch, H query heads, G key heads, N queries, M keys, D channels of a head.
"""

import math

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor
from torch.nn import functional

_MAX_WRITTEN_OUT = 512
"""Most keys for which the table of weights of every head is made."""
_HAS_MATRIX_UNITS = torch.cpu._is_amx_tile_supported()
"""Whether products in bf16 have units of their own on this CPU; asked here, as compilers cannot."""


def attend(
    query: Shaped[Tensor, "b h n d"],
    key: Shaped[Tensor, "b g m d"],
    value: Shaped[Tensor, "b g m d"],
    mask: Shaped[Tensor, "*mask m"] | None,
    *,
    is_causal: bool = False,
) -> Shaped[Tensor, "b h n d"]:
    """Scaled dot-product attention; each key head serves as many query heads as there are to one.

    On CPUs torch's bf16 kernel has a backward pass that takes 2 to 8 times as long as the products
    written out do, at the sizes of the small recipes (docs/log.md), so training there writes them
    out, or for many keys attends in float32. Without matrix units the kernel is slow in any case.

    Args:
        query: what asks.
        key: what is compared with it.
        value: what is mixed.
        mask: true where a query sees a key, or what is added to the logits; None is all.
        is_causal: query i sees keys 0 to i; without a mask.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        is_small = query.shape[2] > 1 and key.shape[2] <= _MAX_WRITTEN_OUT
        if is_small and (query.requires_grad or not _HAS_MATRIX_UNITS):
            return _written_out(query, key, value, mask, is_causal=is_causal)
    if not trains_on_cpu(query) or query.dtype == torch.float32:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
        )
    with torch.autocast("cpu", enabled=False):
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        mixed = functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=grouped,
        )
    return mixed.to(query.dtype)


def attend_apart(
    query: Shaped[Tensor, "b h 1 d"],
    key: Shaped[Tensor, "b g m d"],
    value: Shaped[Tensor, "b g m d"],
    own_key: Shaped[Tensor, "b g 1 d"],
    own_value: Shaped[Tensor, "b g 1 d"],
    mask: Shaped[Tensor, "*mask m"] | None,
) -> Shaped[Tensor, "b h 1 d"]:
    """Attention of a lone query to its own key beside others that lie elsewhere; no gradient.

    On CPUs without a copy of the others: torch's kernel there also returns the log-sum-exp of their
    logits, and the own value is mixed in by its share.

    Args:
        query: what asks; it always sees its own key.
        key: the others.
        value: of the others.
        own_key: of the query's input.
        own_value: of the query's input.
        mask: as in `attend`, of the others alone.
    """
    if query.device.type == "cpu" and query.shape[1] == key.shape[1]:
        mask = None if mask is None else additive_mask(mask, query.dtype)
        others, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask
        )
        logit = (query * own_key).sum(-1, keepdim=True)
        scale = 1 / math.sqrt(query.shape[3])
        share = torch.sub(log_sum_exp[..., None], logit, alpha=scale).sigmoid()
        return torch.lerp(own_value, others, share)
    if mask is not None:
        mask = functional.pad(mask, (0, 1), value=mask.dtype == torch.bool)
    key, value = torch.cat([key, own_key], dim=2), torch.cat([value, own_value], dim=2)
    return attend(query, key, value, mask)


def level_mask(levels: Int64[Tensor, "n"]) -> Bool[Tensor, "n n"]:
    """Which inputs each sees: those of its own level and of lower ones.

    Examples:
        Two inputs that see each other, between one that sees itself alone and one that sees all.

        >>> level_mask(torch.tensor([0, 1, 1, 2])).int().tolist()
        [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return levels <= levels[:, None]


def additive_mask(mask: Shaped[Tensor, "*mask m"], dtype: torch.dtype) -> Shaped[Tensor, "*mask m"]:
    """A mask as what is added to logits: nothing or -inf where it is boolean, else itself."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether a backward pass on a CPU will follow, where some kernels are slow."""
    return x.device.type == "cpu" and x.requires_grad


def _written_out(
    query: Shaped[Tensor, "b h n d"],
    key: Shaped[Tensor, "b g m d"],
    value: Shaped[Tensor, "b g m d"],
    mask: Shaped[Tensor, "*mask m"] | None,
    *,
    is_causal: bool,
) -> Shaped[Tensor, "b h n d"]:
    """The products one by one, in the precision of the inputs."""
    if (times := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    logits = (query / math.sqrt(query.shape[3])) @ key.mT
    if mask is not None:
        logits = logits + additive_mask(mask, logits.dtype)
    return logits.softmax(-1) @ value
