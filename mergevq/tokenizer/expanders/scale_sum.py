"""The sum of the codes of all scales, enlarged to the grid and filtered.

Source: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", section 3.2 and algorithm 2 (arXiv:2404.02905).

Shape letters: B batch, K tokens of the first scales, L grid cells, S scales, D channels of codes.
"""

from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config import parts as settings
from mergevq.data.layouts import Layout
from mergevq.nn.conv import scale_sums
from mergevq.nn.positions import to_tokens
from mergevq.tokenizer.seams import Condition, Expanded, Given


@runtime_checkable
class Filters(Protocol):
    """The quantizer of the scales, which filters enlarged codes."""

    config: settings.Scales

    def kernels(self) -> Float[Tensor, "s d d 3 3"]:
        """Filter of each scale."""
        ...


class ScaleSum(nn.Module):
    """Codes of scales to the sums that they were chosen to make."""

    can_infer: ClassVar[bool] = False

    def __init__(self, quantizer: Filters) -> None:
        """Read filters from the quantizer, whose weights they are and stay."""
        super().__init__()
        # In a tuple, where a module is not registered: its weights have one name.
        self._quantizer = (quantizer,)

    def forward(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,  # noqa: ARG002 - of ordered tokens alone
    ) -> Given:
        """Add the scales that there are; they are the style as well.

        Args:
            codes: of the tokens of the first scales, all or some.
            layout: theirs.
            grid_shape: (height, width) in cells.
            lengths: tokens that each image has, the first ones; None is all.
            condition: not used.

        Raises:
            ValueError: the grid is not that of the scales, or has other tokens.
        """
        (quantizer,) = self._quantizer
        scales = quantizer.config.scales
        quantizer.config.check_kept(grid_shape, layout.num_kept)
        if lengths is not None:
            present = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
            codes = codes * present[..., None]
        *_, total = scale_sums(codes, scales, quantizer.kernels())
        tokens = to_tokens(total).to(codes.dtype)
        return Given(tokens, grid_shape, tokens)

    def train_pass(
        self,
        codes: Float[Tensor, "b k d"],
        seen: Float[Tensor, "b k d"],  # noqa: ARG002 - nothing is inferred
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        inferred: Bool[Tensor, "b"] | None,  # noqa: ARG002 - the order is known of every image
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,  # noqa: ARG002
    ) -> Expanded:
        """Expand in training; there is no loss of its own."""
        return Expanded(self(codes, layout, grid_shape, lengths), {})

    def infer(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of other expanders
        anchors: Int64[Tensor, "b k"] | None = None,  # noqa: ARG002
    ) -> Layout:
        """Refuse: tokens of scales have a layout that nobody needs to infer."""
        raise ValueError(
            f"the layout of {codes.shape[1]} tokens of scales is known; there is nothing to infer"
        )
