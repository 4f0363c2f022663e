"""Frozen models with features of each place of an image: vision models, and other tokenizers.

Source: Xiong et al. 2025, "GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters", section 3.2
(arXiv:2504.08736).

Shape letters: B batch, L grid cells, F features, H and W pixels or cells.
"""

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergevq.config import objective as settings
from mergevq.tokenizer.losses.frozen import HuggingFaceTeacher
from mergevq.tokenizer.tokenizer import Tokenizer


class VisionCells:
    """Features of a vision model from Hugging Face for each cell.

    No `nn.Module` on purpose, as `HuggingFaceTeacher`.
    """

    def __init__(self, config: settings.VisionModel) -> None:
        """Load the model.

        Raises:
            ValueError: neither a folder nor a model on the hub.
            RuntimeError: `transformers` is missing, or the model cannot be loaded or used.
        """
        self.model = HuggingFaceTeacher(config.path)
        self.out_dim = self.model.out_dim
        self.teacher_size = config.teacher_size

    @torch.no_grad()
    def __call__(
        self, image: Float[Tensor, "b 3 h w"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b l f"]:
        """Features of the image at each cell of a grid.

        Args:
            image: values in [-1, 1], of any size.
            grid_shape: (height, width) in cells.

        Raises:
            ValueError: the model does not say how large its patches are, and there is no size.
        """
        size = (self.teacher_size,) * 2 if self.teacher_size else self._size(grid_shape)
        view = image.float()
        if view.shape[2:] != size:
            view = functional.interpolate(view, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return to_cells(self.model.patches(view), grid_shape)

    def _size(self, grid_shape: tuple[int, int]) -> tuple[int, ...]:
        """Size in pixels at which the model has one patch for each cell."""
        patch_size = self.model.patch_size
        if patch_size is None:
            raise ValueError(
                f"distillation.teacher.teacher_size (None) must be a number for teacher "
                f"{self.model.path!r}, which does not say how large its patches are"
            )
        return tuple(side * patch_size for side in grid_shape)


class TokenizerCells:
    """Features of a trained tokenizer's encoder for each cell, with merging off.

    No `nn.Module` on purpose: a module that holds it does not register it. It follows the images to
    their device.
    """

    def __init__(self, config: settings.TrainedTokenizer) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: it is not there, has no such block, or no tokens of cells.
        """
        self.tokenizer = Tokenizer.from_pretrained(config.path, precision="float32")
        self.tokenizer.requires_grad_(requires_grad=False)
        model, num_layers = self.tokenizer.config, self.tokenizer.num_layers
        self.out_dim = model.dim
        self.layer = num_layers if config.layer is None else config.layer
        if self.layer > num_layers:
            raise ValueError(
                f"distillation.teacher.layer ({self.layer}) must be at most the {num_layers} "
                f"blocks of tokenizer {config.path!r}"
            )
        if model.reducer.gives != "source":
            raise ValueError(
                f"tokenizer {config.path!r} has tokens of no place (reducer "
                f"{model.reducer.kind}), and distillation.teacher needs features of each cell; "
                "choose one that merges or pools"
            )

    @torch.no_grad()
    def __call__(
        self, image: Float[Tensor, "b 3 h w"], grid_shape: tuple[int, int]
    ) -> Float[Tensor, "b l f"]:
        """Features of the image at each cell of a grid.

        Args:
            image: values in [-1, 1], of sides that are multiples of the tokenizer's patches.
            grid_shape: (height, width) in cells, of the student.

        Raises:
            ValueError: the image cannot be cut into patches.
        """
        rows, columns = self.tokenizer.grid_shape(image)
        self.tokenizer.to(image.device)
        out = self.tokenizer.encoder(image, rows * columns, self.layer)
        return to_cells(out.tokens.float().mT.unflatten(2, (rows, columns)), grid_shape)


def to_cells(
    features: Float[Tensor, "b f h w"], grid_shape: tuple[int, int]
) -> Float[Tensor, "b l f"]:
    """Features of each cell in raster order, interpolated where the grid is another."""
    if features.shape[2:] != grid_shape:
        features = functional.interpolate(features, grid_shape, mode="bilinear", antialias=True)
    return features.flatten(2).mT


def build_cells(config: settings.CellTeacher) -> VisionCells | TokenizerCells:
    """Frozen model of a kind.

    Raises:
        ValueError: it is not there, or has no features of places.
        RuntimeError: `transformers` is missing, or the model cannot be loaded or used.
    """
    match config:
        case settings.VisionModel():
            return VisionCells(config)
        case settings.TrainedTokenizer():
            return TokenizerCells(config)
        case _:
            assert_never(config)
