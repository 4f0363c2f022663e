"""Losses on features of the tokenizer's layers, against those of a frozen model.

`semantic` holds tokens of a decoder block near features of a vision model at the same cells;
`preserve` holds each block of the encoder near what it was when training started.

Source: Xiong et al. 2025, "GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters", section 3.2
(semantic regularisation, arXiv:2504.08736); Yue et al. 2025, "UniFlow: A Unified Pixel Flow
Tokenizer for Visual Understanding and Generation" (layer-wise adaptive self-distillation,
arXiv:2510.10575), from its formula: the public code has no training.

Differs: GigaTok's loss is minus the cosine, which has the same gradient; its decoder reads ordered
tokens, here the cells of a grid, whatever gives them. UniFlow's beta is not known; here it is 2,
and no gradient passes through the weights of the blocks.

Shape letters: B batch, L grid cells, N tokens, C channels of the encoder, E channels of the
decoder's blocks, F features, J blocks of the encoder, H and W pixels.
"""

import copy
from typing import ClassVar, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import objective as settings
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.runtime import distributed
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.losses.cells import TokenizerCells, VisionCells, build_cells
from mergevq.tokenizer.seams import TokenizerOutput

HEAD_RATIO = 4
"""Hidden width of the semantic head as a multiple of the decoder's (GigaTok)."""


class Semantic(nn.Module):
    """Tokens of a decoder block, through a head, near a frozen model's features at their cells.

    Args:
        config: settings.
        dim: channels of the decoder's blocks.
        teacher: frozen; held, but not registered.
    """

    name: ClassVar[str] = "semantic"

    def __init__(
        self, config: settings.Semantic, dim: int, teacher: VisionCells | TokenizerCells
    ) -> None:
        super().__init__()
        self.decoder_layer: int | None = config.layer
        self.teacher = teacher
        hidden = HEAD_RATIO * dim
        self.head = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher.out_dim),
        )

    def loss(
        self, _encoder: Encoder, image: Float[Tensor, "b 3 h w"], output: TokenizerOutput, /
    ) -> Float[Tensor, ""]:
        """One minus the cosine, in [0, 2]: mean over cells and images, in float32.

        Raises:
            ValueError: the output has no tokens of the decoder.
        """
        if output.decoded is None:
            raise ValueError(f"distillation 'semantic' needs decoder_layer {self.decoder_layer}")
        target = self.teacher(image, output.encoded.grid_shape)
        return cosine_distance(self.head(output.decoded), target)


class Preserve(nn.Module):
    """Tokens after each block of the encoder near those of a frozen copy, with merging off.

    Args:
        config: settings.
        encoder: with its first weights, of which a copy is kept; a checkpoint has it too.
    """

    name: ClassVar[str] = "preserve"

    def __init__(self, config: settings.Preserve, encoder: Encoder) -> None:
        super().__init__()
        self.decoder_layer: int | None = None
        self.beta, self.every = config.beta, config.every
        self.encoder = copy.deepcopy(encoder).requires_grad_(requires_grad=False)

    def loss(
        self, encoder: Encoder, image: Float[Tensor, "b 3 h w"], _output: TokenizerOutput, /
    ) -> Float[Tensor, ""]:
        """Weighted mean over blocks of one minus the cosine, in [0, 2], in float32.

        The weights are those of the whole batch, on every rank; all ranks call.
        """
        image = image[:: self.every]
        with torch.no_grad():
            true = self.encoder.layers(image)
        pairs = zip(encoder.layers(image), true, strict=True)
        distances = torch.stack([cosine_distance(found, kept) for found, kept in pairs])
        return (layer_weights(distributed.mean(distances.detach()), self.beta) * distances).sum()


def layer_weights(distances: Float[Tensor, "j"], beta: float) -> Float[Tensor, "j"]:
    """Weight of each block: j / J times e to the power of beta times its distance, over their sum.

    Args:
        distances: of the J blocks, the first one first.
        beta: growth with the distance.
    """
    with torch.autocast(distances.device.type, enabled=False):
        count = len(distances)
        shares = torch.arange(1, count + 1, device=distances.device) / count
        return (shares.log() + beta * distances).softmax(0)


def cosine_distance(
    student: Float[Tensor, "b n f"], target: Float[Tensor, "b n f"]
) -> Float[Tensor, ""]:
    """One minus the cosine of the angle of features, mean over places and images, in float32."""
    return 1 - functional.cosine_similarity(student.float(), target.detach().float(), -1).mean()


Distillation = Semantic | Preserve


def build_distillation(
    config: settings.Distillation, model: TokenizerConfig, encoder: Encoder
) -> Distillation | None:
    """Make the distillation a configuration asks for.

    Args:
        config: kind and settings.
        model: architecture of the tokenizer.
        encoder: of the tokenizer, with its first weights.

    Returns:
        A module in training mode, or None for kind `none`.

    Raises:
        ValueError: a teacher is not there, or does not fit.
        RuntimeError: a teacher cannot be loaded.
    """
    match config:
        case settings.NoDistillation():
            return None
        case settings.Semantic():
            return Semantic(config, model.decoder.width, build_cells(config.teacher))
        case settings.Preserve():
            return Preserve(config, encoder)
        case _:
            assert_never(config)
