"""A flow decoder whose patches look at each other and at the first tokens, any number of them.

Source: Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible
Length", section 3 (arXiv:2502.13967); Peebles and Xie 2023, "Scalable Diffusion Models with
Transformers", section 3.2 (arXiv:2212.09748).

Differs: pixels in the place of latents of a VAE, no teacher for features between the layers; with a
source map each patch is given the token of its cell, and no other token is there to look at.

Shape letters: B batch, N slots, M patches, C channels, H and W pixels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mergevq.config.parts import flows as settings
from mergevq.nn.adaln import AdaBlock, AdaOutput, TimeEmbedding, zero_start
from mergevq.nn.blocks import ContextBlock, initialize, run_blocks
from mergevq.nn.flow import unshift_time
from mergevq.nn.positions import from_patches, sincos_2d, to_patches
from mergevq.tokenizer.flows.schedules import visible
from mergevq.tokenizer.flows.tokens import Embedded, Shown, TokenReader, on_patches


class PrefixFlow(nn.Module):
    """Velocities of pixels by a transformer over patches and tokens."""

    def __init__(self, config: settings.FlowConfig, part: settings.PrefixFlow) -> None:
        """Make the layers; velocities are zero at the start."""
        super().__init__()
        dim, self.patch_size = part.dim, part.patch_size
        self.num_patches = config.cell_size // part.patch_size
        self.checkpointing = False
        self.reader = TokenReader(config.code_dim, dim, config.num_slots)
        self.embed = nn.Linear(3 * part.patch_size**2, dim)
        self.time = TimeEmbedding(dim)
        self.slots: nn.Parameter | None = None
        if config.num_slots is not None:
            self.slots = nn.Parameter(0.02 * torch.randn(config.num_slots, dim))
        num_sets = 1 if self.slots is None else 2
        self.blocks = nn.ModuleList(
            AdaBlock(dim, part.num_heads, dim, num_sets) for _ in range(part.num_layers)
        )
        self.schedule, self.shift = part.schedule, config.times.shift
        self.token_blocks = nn.ModuleList(
            ContextBlock(dim, part.num_heads) for _ in range(part.num_token_layers)
        )
        self.output = AdaOutput(dim, dim, 3 * part.patch_size**2)
        initialize(self)
        zero_start(self)

    def read(self, shown: Shown) -> Embedded:
        """Read tokens, once for all times: each by those of lower ranks and itself."""
        embedded = self.reader(shown)
        if len(self.token_blocks) == 0:
            return embedded
        tokens = embedded.tokens
        if self.slots is not None:
            tokens = tokens + self.slots.to(tokens.dtype)
        mask = embedded.ranks[:, None, None, :] <= embedded.ranks[:, None, :, None]
        tokens = run_blocks(
            self.token_blocks, tokens, None, recompute=self.checkpointing, mask=mask
        )
        return embedded._replace(tokens=tokens)

    def forward(
        self, x: Float[Tensor, "b 3 h w"], time: Float[Tensor, "b"], embedded: Embedded
    ) -> Float[Tensor, "b 3 h w"]:
        """Velocities at points and times."""
        shape = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        patches = self.embed(to_patches(x, self.patch_size))
        positions = sincos_2d(shape, patches.shape[-1], x.device)
        patches = patches + positions.to(patches.dtype)
        sees = visible(self.schedule, embedded.ranks, unshift_time(time, self.shift))
        seen = self.reader.seen(embedded, sees)
        count, sizes = patches.shape[1], (patches.shape[1],)
        if self.slots is not None:
            sizes = (count, seen.shape[1])
            tokens = torch.cat([patches, seen + self.slots.to(seen.dtype)], dim=1)
        elif embedded.cells is not None:
            tokens = patches + on_patches(
                seen, embedded.cells, embedded.grid_shape, self.num_patches
            )
        else:
            raise ValueError("the decoder was trained on tokens with a source map, and has none")
        cond = self.time(time)[:, None]
        for block in self.blocks:
            if self.checkpointing:
                tokens = checkpoint(block, tokens, cond, sizes, use_reentrant=False)
            else:
                tokens = block(tokens, cond, sizes)
        return from_patches(self.output(tokens[:, :count], cond), self.patch_size, shape)
