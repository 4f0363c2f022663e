"""A flow decoder of patches that do not see each other: each has a condition, made once.

Source: Yue et al. 2025, "UniFlow: A Unified Pixel Flow Tokenizer for Visual Understanding and
Generation" (patch-wise pixel flow decoder, arXiv:2510.10575); Li et al. 2024, "Autoregressive Image
Generation without Vector Quantization", section 3 (an MLP with a modulated norm for each token, and
several noises for one condition, arXiv:2406.11838).

Differs: conditions are of a frozen tokenizer's codes, and the encoder is not distilled; guidance
and hidden tokens are there as in `flows.prefix`, by settings.

Shape letters: B batch, N slots, M patches, C channels, P numbers of a patch, H and W pixels.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config.parts import flows as settings
from mergevq.nn.adaln import AdaMlp, AdaOutput, TimeEmbedding, zero_start
from mergevq.nn.blocks import ContextBlock, initialize, run_blocks
from mergevq.nn.positions import from_patches, sincos_2d, to_patches
from mergevq.tokenizer.flows.tokens import Embedded, Shown, TokenReader, on_patches


class PixelFlow(nn.Module):
    """Velocities of the pixels of each patch by an MLP of its own condition."""

    def __init__(self, config: settings.FlowConfig, part: settings.PixelFlow) -> None:
        """Make the layers; velocities are zero at the start."""
        super().__init__()
        self.patch_size = part.patch_size
        self.num_patches = config.cell_size // part.patch_size
        self.checkpointing = False
        self.reader = TokenReader(config.code_dim, part.dim, config.num_slots)
        self.trunk = nn.ModuleList(
            ContextBlock(part.dim, part.num_heads) for _ in range(part.num_global_layers)
        )
        self.time = TimeEmbedding(part.dim)
        self.embed = nn.Linear(3 * part.patch_size**2, part.width)
        self.blocks = nn.ModuleList(AdaMlp(part.width, part.dim) for _ in range(part.depth))
        self.output = AdaOutput(part.width, part.dim, 3 * part.patch_size**2)
        initialize(self)
        zero_start(self)

    def read(self, shown: Shown) -> Embedded:
        """Make the condition of each patch, once for all times."""
        embedded = self.reader(shown)
        if embedded.cells is None:
            raise ValueError("the decoder was trained on tokens with a source map, and has none")
        height, width = (side * self.num_patches for side in embedded.grid_shape)
        patches = on_patches(
            self.reader.seen(embedded), embedded.cells, embedded.grid_shape, self.num_patches
        )
        positions = sincos_2d((height, width), patches.shape[-1], patches.device)
        patches = run_blocks(
            self.trunk, patches + positions.to(patches.dtype), None, recompute=self.checkpointing
        )
        return embedded._replace(tokens=patches)

    def forward(
        self, x: Float[Tensor, "b 3 h w"], time: Float[Tensor, "b"], embedded: Embedded
    ) -> Float[Tensor, "b 3 h w"]:
        """Velocities at points and times."""
        shape = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        patches = self.denoise(to_patches(x, self.patch_size), time, embedded.tokens)
        return from_patches(patches, self.patch_size, shape)

    def denoise(
        self,
        patches: Float[Tensor, "b m p"],
        time: Float[Tensor, "b"],
        conditions: Float[Tensor, "b m c"],
    ) -> Float[Tensor, "b m p"]:
        """Velocities of patches, each by itself."""
        cond = conditions + self.time(time)[:, None]
        tokens = self.embed(patches)
        for block in self.blocks:
            tokens = block(tokens, cond)
        return self.output(tokens, cond)
