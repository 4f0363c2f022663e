"""A decoder that stays on the grid: blocks of one width, then all pixels of a cell at once.

Source: Liu et al. 2022, "A ConvNet for the 2020s", section 2 (blocks of a depth-wise convolution
and an MLP, arXiv:2201.03545); Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution",
section 3.2 (depth to space, arXiv:1609.05158).

Differs: the paper's decoder upsamples by residual convolutions (`decoders.cnn`), most of whose
products are at full resolution; here nearly all are on the grid, so that it trains on a CPU.

Shape letters: B batch, L grid cells, C and E channels, D bits, H and W pixels, P numbers of a cell
(3 f^2).
"""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mergevq.config import parts as settings
from mergevq.nn.blocks import NORM_EPS, ContextBlock, initialize
from mergevq.nn.norm import LayerNorm
from mergevq.nn.positions import sincos_2d, to_grid, to_tokens
from mergevq.nn.precision import without_autocast
from mergevq.tokenizer.seams import Given

_POSITION_SCALE = 0.5
"""Amplitude of the positions, beside signs that a fresh 1x1 convolution makes about as large."""


class GridConv(nn.Module):
    """A depth-wise 3x3 convolution, a norm and an MLP, around a shortcut."""

    def __init__(self, dim: int) -> None:
        """Make the layers; the MLP widens by 4."""
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(
        self, x: Float[Tensor, "b l c"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b l c"]:
        """Mix neighbours on a grid of (height, width) cells."""
        hidden = self.norm(to_tokens(self.dwconv(to_grid(x, grid_shape))))
        return x + self.fc2(functional.gelu(self.fc1(hidden)))


class PixelSkip(nn.Module):
    """Pixels of a cell as a linear function of products of its own signs.

    Products of all bits of one component can give it any level, and the gradient of a sign is half
    the difference that flipping it makes.
    """

    def __init__(self, groups: tuple[tuple[int, ...], ...], num_pixels: int) -> None:
        """Make a weight for each product.

        Args:
            groups: bits of each component.
            num_pixels: P.
        """
        super().__init__()
        self.subsets = tuple(
            subset
            for group in groups
            for size in range(1, len(group) + 1)
            for subset in itertools.combinations(group, size)
        )
        """Bits of each product, in the order of the weights."""
        self.linear = nn.Linear(len(self.subsets), num_pixels)

    def forward(self, codes: Float[Tensor, "b l d"]) -> Float[Tensor, "b l p"]:
        """Map signs to pixels, in the weights' precision whatever autocast says."""
        products: dict[tuple[int, ...], Tensor] = {}
        with without_autocast(codes):
            codes = codes.to(self.linear.weight.dtype)
            for subset in self.subsets:
                # The product of all but the last bit is there already: small subsets come first.
                last = codes[..., subset[-1]]
                products[subset] = products[subset[:-1]] * last if len(subset) > 1 else last
            return self.linear(torch.stack([products[subset] for subset in self.subsets], -1))


class PatchDecoder(nn.Module):
    """Blocks on the grid, then pixels of a cell at once and one convolution over the seams."""

    def __init__(self, config: settings.PatchDecoder, in_dim: int, patch_size: int) -> None:
        """Build for settings.

        Args:
            config: settings.
            in_dim: channels of the input.
            patch_size: pixels per side of a cell, an even number.
        """
        super().__init__()
        dim, num_pixels = config.width, 3 * patch_size**2
        self.pixels_per_half = patch_size // 2
        self.conv_in = nn.Conv2d(in_dim, dim, 1)
        self.blocks = nn.ModuleList(
            GridConv(dim) if kind == "c" else ContextBlock(dim, config.num_heads)
            for kind in config.blocks
        )
        self.norm_out = LayerNorm(dim, eps=NORM_EPS)
        # Four quarters of a cell with as many channels each as the cell has numbers.
        self.to_half = nn.Linear(dim, 4 * num_pixels)
        self.conv_out = nn.Conv2d(num_pixels, num_pixels // 4, 3, padding=1)
        groups = config.bit_groups
        self.skip = PixelSkip(groups, num_pixels) if groups else None
        self.checkpointing = False
        """Recompute the blocks in the backward pass."""
        initialize(self.blocks)

    def forward(
        self, given: Given, outputs: dict[int, Tensor] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode an embedding per cell to an image in about [-1, 1]; style has no effect."""
        codes, grid_shape = given.tokens, given.grid_shape
        outputs = {} if outputs is None else outputs
        x = to_tokens(self.conv_in(to_grid(codes.to(self.conv_in.weight.dtype), grid_shape)))
        x = x + _POSITION_SCALE * sincos_2d(grid_shape, x.shape[-1], x.device).to(x.dtype)
        if 0 in outputs:
            outputs[0] = x
        for number, block in enumerate(self.blocks, 1):
            arguments = (x, grid_shape) if isinstance(block, GridConv) else (x,)
            if self.checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if number in outputs:
                outputs[number] = x
        half = to_grid(functional.silu(self.to_half(self.norm_out(x))), grid_shape)
        quarters = self.conv_out(functional.pixel_shuffle(half, 2))
        image = functional.pixel_shuffle(quarters, self.pixels_per_half)
        if self.skip is None:
            return image
        own = to_grid(self.skip(codes), grid_shape)
        return image + functional.pixel_shuffle(own, 2 * self.pixels_per_half)
