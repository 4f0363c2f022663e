"""Blocks of the generator: rotary attention with a cache, gated feed-forward, MergeAR's visibility.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2.2 (blocks, 2-D rotary embedding, arXiv:2406.06525); Li et al. 2025,
"MergeVQ", equation 12 and figure 6 (visibility, arXiv:2504.00999).

Shape letters: B batch, N inputs, M keys, T tokens of a sequence, C channels, H heads, G heads of
keys and values, D channels of a head, R is B or 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mergevq.nn.attention import attend

NORM_EPS = 1e-5
"""Added to the variance in every normalisation, as in LlamaGen."""
# `addcmul` adds to nothing but a tensor.
_EPS = torch.tensor(NORM_EPS)
ROTATION_BASE = 10000.0
"""Longest wavelength of the rotary embedding over 2 pi, in cells."""
Mask = Bool[Tensor, "r n m"] | Float[Tensor, "r n m"] | BlockMask
"""Visibility: true where an input sees a key, or what is added to the logits, or in blocks."""
Recall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Given queries, keys and values of new inputs, attends to these and to those it remembers."""


class Rotation(NamedTuple):
    """Turns of the rotary embedding; both channels of a pair have the pair's."""

    cos: Float32[Tensor, "r 1 n d"]
    """Share of itself that each channel keeps."""
    sin: Float32[Tensor, "r 1 n d"]
    """Share of the other channel of its pair that each gets: minus and plus the sine."""


def cell_positions(
    grid_size: tuple[int, int], device: torch.device | None = None
) -> Float[Tensor, "l 2"]:
    """Row and column of each cell of a (height, width) grid, from (1, 1); (0, 0) is the prefix."""
    height, width = grid_size
    cells = torch.arange(height * width, device=device)
    return torch.stack([cells // width + 1, cells % width + 1], dim=-1).float()


def rotation(positions: Float[Tensor, "r n 2"], head_dim: int) -> Rotation:
    """Turns for positions on a plane: half of the channel pairs turn by row, half by column."""
    pairs = head_dim // 4
    frequencies = ROTATION_BASE ** (-torch.arange(pairs, device=positions.device) / pairs)
    angles = (positions.float()[..., None] * frequencies).flatten(-2)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return Rotation(
        torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    )


def rotate(x: Float[Tensor, "b h n d"], turns: Rotation) -> Float32[Tensor, "b h n d"]:
    """Turn each pair of neighbouring channels, in float32."""
    # Few operators and one type: while decoding, each cast costs as much as a product.
    x = x.float()
    others = x.view(*x.shape[:-1], -1, 2).flip(-1).view(x.shape)
    return torch.addcmul(x * turns.cos, others, turns.sin)


def normalized(x: Float[Tensor, "*shape c"], dtype: torch.dtype) -> Float[Tensor, "*shape c"]:
    """The last axis over its root mean square, computed in at least float32, as another type."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return functional.rms_norm(x, x.shape[-1:], None, NORM_EPS).to(dtype)
    # The same in half as many operators, of which decoding a token needs hundreds.
    exact = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    square = torch.addcmul(_EPS.to(exact), length, length, value=1 / x.shape[-1])
    return (x * square.rsqrt_()).to(dtype)


class RmsNorm(nn.Module):
    """Root-mean-square normalisation that keeps the type of its input, also under autocast.

    Of a gain in fewer bits the result has the type: what a layer of such weights multiplies.
    """

    def __init__(self, dim: int) -> None:
        """Start with a gain of 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*shape c"]) -> Float[Tensor, "*shape c"]:
        """Normalise the last axis, in float32 inside."""
        dtype = x.dtype if self.weight.dtype == torch.float32 else self.weight.dtype
        return normalized(x, dtype) * self.weight.to(dtype)


class Projection(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Draw the weight from torch's default generator."""
        super().__init__(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, grouped key heads and an optional cache."""

    def __init__(self, *, dim: int, num_heads: int, key_heads: int, qk_norm: bool) -> None:
        """Make the projections; `dim` must be a multiple of `num_heads`, it one of `key_heads`."""
        super().__init__()
        self.num_heads, self.key_heads, self.head_dim = num_heads, key_heads, dim // num_heads
        self.qkv = Projection(dim, (num_heads + 2 * key_heads) * self.head_dim)
        self.out = Projection(dim, dim)
        self.query_norm = RmsNorm(self.head_dim) if qk_norm else None
        self.key_norm = RmsNorm(self.head_dim) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        turns: Rotation | None,
        mask: Mask | None = None,
        recall: Recall | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: inputs.
            turns: of queries and keys; None leaves them as they are.
            mask: which keys (last axis) each input sees, or what is added to their logits; None is
                all up to itself.
            recall: attends in the place of this layer, to older inputs too; it has its own mask.
        """
        return self.out(self.mix(self.qkv(x), turns, mask, recall))

    def keys_values(
        self, x: Float[Tensor, "b n c"], turns: Rotation
    ) -> tuple[Float[Tensor, "b g n d"], Float[Tensor, "b g n d"]]:
        """Keys and values of inputs that only others attend to."""
        weight = self.qkv.weight[self.num_heads * self.head_dim :]
        heads = functional.linear(x, weight).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        key, value = heads.chunk(2, dim=1)
        return rotate(key if self.key_norm is None else self.key_norm(key), turns), value

    def mix(
        self,
        qkv: Float[Tensor, "b n _"],
        turns: Rotation | None,
        mask: Mask | None,
        recall: Recall | None,
    ) -> Float[Tensor, "b n c"]:
        """Everything between the projections, on heads of queries, then of keys, then of values.

        The other arguments are those of `forward`.
        """
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        asking = self.num_heads + self.key_heads
        # Queries and keys together, as far as they are treated alike.
        turned, value = heads[:, :asking], heads[:, asking:]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
            turned = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        if turns is not None:
            turned = rotate(turned, turns)
        query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
        if recall is None:
            attended = _attend(query.to(value.dtype), key.to(value.dtype), value, mask)
        else:
            # Turned in float32; a cache may remember in another type than the layer's.
            attended = recall(query, key, value)
        return attended.to(qkv.dtype).transpose(1, 2).flatten(2)


def _attend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m d"],
    mask: Mask | None,
) -> Float[Tensor, "b h n d"]:
    """Scaled dot-product attention, by a block mask where there is one."""
    if isinstance(mask, BlockMask):
        grouped = query.shape[1] != key.shape[1]
        attended = _compiled_flex_attention()(
            query, key, value, block_mask=mask, enable_gqa=grouped
        )
        return attended[0] if isinstance(attended, tuple) else attended
    # A lone query sees all keys; `is_causal` would align it with the first.
    is_causal = mask is None and query.shape[2] > 1
    plain = None if mask is None else mask[:, None]
    return attend(query, key, value, plain, is_causal=is_causal)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Flex attention is fast only when compiled, and compiling is for those who use it."""
    return torch.compile(flex_attention)


class SwiGlu(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        """Make the projections; gate and value share one."""
        super().__init__()
        self.up = Projection(dim, 2 * hidden_dim)
        self.down = Projection(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Apply to each token alone."""
        return self.down(gated(self.up(x)))


def gated(x: Float[Tensor, "b n c2"]) -> Float[Tensor, "b n c"]:
    """The second half of the channels times SiLU of the first."""
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


class Dropout(nn.Dropout):
    """Dropout with the numbers of a whole batch, of which the input is a share.

    A rank, or a part of a rank's batch, then drops what one process with all of the batch would, if
    torch's own generator starts alike everywhere. Numbers for all shares are drawn by each.
    """

    share: tuple[int, int] = (0, 1)
    """Which of how many equal shares of the batch the input is."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Drop; in evaluation the input itself."""
        index, count = self.share
        if count == 1 or self.p == 0 or not self.training:
            return functional.dropout(input, self.p, self.training)
        size = len(input)
        whole = functional.dropout(input.new_ones(count * size, *input.shape[1:]), self.p)
        return input * (whole[index * size : (index + 1) * size] != 0) * (1 / (1 - self.p))


def set_share(module: nn.Module, index: int, count: int) -> None:
    """Set which of `count` equal shares of the batch comes next, for every `Dropout` inside."""
    for part in module.modules():
        if isinstance(part, Dropout):
            part.share = (index, count)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_heads: int,
        key_heads: int,
        qk_norm: bool,
        dropout: float,
    ) -> None:
        """Make the layers; `dim` must be a multiple of `num_heads`, it one of `key_heads`."""
        super().__init__()
        self.attention_norm = RmsNorm(dim)
        self.attention = Attention(
            dim=dim, num_heads=num_heads, key_heads=key_heads, qk_norm=qk_norm
        )
        self.ffn_norm = RmsNorm(dim)
        self.ffn = SwiGlu(dim, hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        turns: Rotation | None = None,
        mask: Mask | None = None,
        recall: Recall | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix tokens, then channels; arguments are those of `Attention`."""
        x = x + self._drop(self.attention(self.attention_norm(x), turns, mask, recall))
        return x + self._drop(self.ffn(self.ffn_norm(x)))

    def _drop(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Dropout, which decoding need not even call."""
        return self.dropout(x) if self.training else x
