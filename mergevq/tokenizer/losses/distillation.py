"""Losses on features of the tokenizer's layers, against those of a frozen model.

`semantic` holds tokens of a decoder block near features of a vision model at the same cells.

Source: Xiong et al. 2025, "GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters", section 3.2
(semantic regularisation, arXiv:2504.08736).

Differs: GigaTok's loss is minus the cosine, which has the same gradient; its decoder reads ordered
tokens, here the cells of a grid, whatever gives them.

Shape letters: B batch, L grid cells, E channels of the decoder's blocks, F features, H and W
pixels.
"""

from typing import ClassVar, assert_never

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergevq.config import objective as settings
from mergevq.config.tokenizer import TokenizerConfig
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


def cosine_distance(
    student: Float[Tensor, "b n f"], target: Float[Tensor, "b n f"]
) -> Float[Tensor, ""]:
    """One minus the cosine of the angle of features, mean over places and images, in float32."""
    return 1 - functional.cosine_similarity(student.float(), target.detach().float(), -1).mean()


Distillation = Semantic


def build_distillation(
    config: settings.Distillation, model: TokenizerConfig
) -> Distillation | None:
    """Make the distillation a configuration asks for.

    Args:
        config: kind and settings.
        model: architecture of the tokenizer.

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
        case _:
            assert_never(config)
