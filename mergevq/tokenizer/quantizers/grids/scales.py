"""Codes of a grid at several scales: each scale's are of what the scales before it leave.

    for each scale: codes nearest to the area means of the rest; the rest less the codes, enlarged

What a decoder reads is the sum of the enlarged codes of all scales (`nn.conv.scale_sums`), which
expander `scale_sum` makes.

Source: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", section 3.2 and algorithms 1 and 2 (arXiv:2404.02905).

Differs: filters have no bias and begin as the identity, so that scales which are left out add
nothing; each choice of a code passes gradients straight to the mean that it stands for, where the
authors pass that of the sum to the latents, so that sums over the first scales teach those alone;
the decoder's gradient reaches the filters; they are shared by even runs of scales.

Shape letters: B batch, L grid cells, H cells along a side, K tokens of all scales, S scales,
C channels, V codes.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.data.codes import CodeSpec
from mergevq.data.layouts import Ordered
from mergevq.nn.conv import from_scale, scale_sums, to_scale
from mergevq.nn.positions import to_grid
from mergevq.tokenizer.quantizers.tables import Table, follow, near_codes, nearest, statistics_of
from mergevq.tokenizer.seams import Quantized


class Step(NamedTuple):
    """Tokens of one scale."""

    means: Float[Tensor, "b n c"]
    """Area means of the rest."""
    chosen: Int64[Tensor, "b n"]
    """Numbers of their codes."""
    codes: Float[Tensor, "b n c"]
    """The codes, with the gradient of the means."""


class Scales(nn.Module):
    """L latents of a square grid to the K tokens of its scales."""

    is_random: ClassVar[bool] = False

    def __init__(self, config: settings.Scales) -> None:
        """Draw the first codes."""
        super().__init__()
        self.config = config
        self.spec = CodeSpec(sizes=config.sizes, dim=config.dim)
        self.table = Table(
            config.codebook_size, config.dim, l2_norm=False, rotates=False, update=config.update
        )
        self.filters = nn.ModuleList(
            nn.Conv2d(config.dim, config.dim, 3, padding=1, bias=False)
            for _ in range(min(config.num_filters, len(config.scales)))
        )
        for each in self._filters:
            nn.init.dirac_(each.weight)

    @property
    def _filters(self) -> list[nn.Conv2d]:
        """The filters, by their class."""
        return [each for each in self.filters if isinstance(each, nn.Conv2d)]

    def kernels(self) -> Float[Tensor, "s c c 3 3"]:
        """Filter of each scale: a share of a convolution, and for the rest codes as they are."""
        share, count = self.config.filter_share, len(self.config.scales)
        weights = [each.weight.float() for each in self._filters]
        same = nn.init.dirac_(torch.empty_like(weights[0]))
        mixed = [share * weight + (1 - share) * same for weight in weights]
        return torch.stack([mixed[scale * len(mixed) // count] for scale in range(count)])

    def forward(
        self, latents: Float[Tensor, "b l c"], _uniforms: Float[Tensor, "b k c"] | None = None
    ) -> Quantized:
        """Tokens of all scales, the coarsest first; the first scales' do not depend on later ones.

        Raises:
            ValueError: the latents are not those of the grid of the last scale.
        """
        steps = list(self._steps(latents))
        codes = torch.cat([step.codes for step in steps], dim=1)
        return Quantized(codes, torch.cat([step.chosen for step in steps], dim=1)[..., None])

    def decode(self, parts: Int64[Tensor, "*b 1"]) -> Float[Tensor, "*b c"]:
        """Codes of tokens of any scale."""
        self.spec.check(parts)
        return self.table.codes()[parts[..., 0]]

    def near(
        self,
        parts: Int64[Tensor, "*b 1"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
    ) -> Int64[Tensor, "*b 1"]:
        """Take another of the nearest `num_near` codes of 4,096 of the table."""
        codes = self.table.codes()
        return near_codes(codes, parts[..., 0], uniforms[..., 0], num_near)[..., None]

    def losses(self, latents: Float[Tensor, "b l c"]) -> dict[str, Float[Tensor, ""]]:
        """Mean squared distance of the latents to the sums so far, a mean over the scales.

        `commitment` moves latents; where codes are weights, `codebook` moves codes and filters.
        """
        with torch.autocast(latents.device.type, enabled=False):
            chosen = self(latents.detach()).parts[..., 0]
            codes = functional.embedding(chosen, self.table.codes())
            sums = list(scale_sums(codes, self.config.scales, self.kernels()))
            grid = self._grid(latents)
            losses = {"commitment": _mean_error(grid, [each.detach() for each in sums])}
            if isinstance(self.table.entries, nn.Embedding):
                losses["codebook"] = _mean_error(grid.detach(), sums)
            return losses

    def statistics(
        self,
        latents: Float[Tensor, "n c"],
        parts: Int64[Tensor, "m 1"],  # noqa: ARG002 - means need the codes again
        generator: torch.Generator,
    ) -> list[Float[Tensor, "v d"]]:
        """Statistics of the area means of a step, of all scales."""
        cells = self.config.scales[-1] ** 2
        steps = list(self._steps(latents.detach().unflatten(0, (-1, cells))))
        means = torch.cat([step.means for step in steps], dim=1).flatten(0, 1)
        chosen = torch.cat([step.chosen for step in steps], dim=1).flatten()
        return statistics_of([self.table], [means], [chosen], generator)

    def follow(self, statistics: Sequence[Float[Tensor, "v d"]]) -> None:
        """Move running means to the area means of a step, of all scales."""
        follow([self.table], statistics)

    def implied(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of reducers
        num_kept: int,
        num_images: int,  # noqa: ARG002
    ) -> Ordered:
        """The layout of the tokens of the first scales, which needs no map."""
        return Ordered(num_kept)

    def _steps(self, latents: Float[Tensor, "b l c"]) -> Iterator[Step]:
        """Quantize scale after scale, in float32."""
        scales, codes, kernels = self.config.scales, self.table.codes(), self.kernels()
        codes, kernels = codes.detach(), kernels.detach()
        with torch.autocast(latents.device.type, enabled=False):
            rest = self._grid(latents)
            for scale, kernel in zip(scales, kernels, strict=True):
                means = to_scale(rest, scale)
                chosen = nearest(means.detach(), codes)
                # The added zero carries the gradient, and leaves the codes exact.
                step = Step(means, chosen, codes[chosen] + (means - means.detach()))
                yield step
                rest = rest - from_scale(step.codes, scales[-1], kernel)

    def _grid(self, latents: Float[Tensor, "b l c"]) -> Float[Tensor, "b c h h"]:
        """Latents on their grid, in float32."""
        side = self.config.scales[-1]
        if latents.shape[1] != side**2:
            raise ValueError(
                f"latents ({latents.shape[1]}) must be those of {side} x {side} cells, the last of "
                f"quantizer.scales {self.config.scales}: give images of the trained size, into "
                "which size_policy 'tile' cuts larger ones"
            )
        return to_grid(latents.float(), (side, side))


def _mean_error(
    grid: Float[Tensor, "b c h h"], sums: list[Float[Tensor, "b c h h"]]
) -> Float[Tensor, ""]:
    """Mean squared distance of a grid to several."""
    return torch.stack([functional.mse_loss(each, grid) for each in sums]).mean()
