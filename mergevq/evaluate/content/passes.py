"""Images through a tokenizer and back, at several K: what evaluations of their content share.

Shape letters: B batch, H and W pixels, K kept tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from mergevq.config.base import RecoverySource
from mergevq.config.evaluation import Reconstructor
from mergevq.config.records import ModelRecord
from mergevq.data.layouts import Ordered
from mergevq.data.prepare import to_tensor
from mergevq.metrics.image import to_uint8
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.device import autocast, resolve_device, resolve_precision
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.conditions.values import condition_of
from mergevq.tokenizer.flows.decoder import Noise
from mergevq.tokenizer.tokenizer import Tokenizer


class Way(NamedTuple):
    """One way for images to come back."""

    num_kept: int
    source: RecoverySource


class Numbered(NamedTuple):
    """Which images of the data a batch has."""

    positions: Int64[Tensor, "b"]
    """In the data, which a decoder that begins from noise depends on."""
    labels: Int64[Tensor, "b"]
    """Classes, -1 where there is none."""


class Passes(NamedTuple):
    """A tokenizer, ready to compute."""

    tokenizer: Tokenizer
    record: ModelRecord
    device: torch.device
    precision: torch.dtype | None
    """Type that the model is autocast to; None is float32."""
    ways: list[Way]
    """Each K with the given source, and with the recovered one where there are maps."""

    @torch.no_grad()
    def reconstruct(
        self, image: Float[Tensor, "b 3 h w"], way: Way, batch: Numbered
    ) -> Float[Tensor, "b 3 h w"]:
        """Images that come back, on the CPU.

        Ordered tokens are encoded at the tokenizer's own K, of which the first ones are decoded.

        Args:
            image: in [-1, 1].
            way: K and source.
            batch: numbers and classes of the images.

        Raises:
            ValueError: K is not legal, or the tokenizer needs a text of each image.
        """
        tokenizer, noise = self.tokenizer, Noise(0, batch.positions.tolist())
        condition = condition_of(tokenizer.config.condition, batch.labels, "an evaluation")
        with autocast(self.device, self.precision):
            embedded = tokenizer.embed(image.to(self.device))
            if way.num_kept < tokenizer.config.num_kept and self.is_ordered():
                encoded = tokenizer.encode(embedded, condition=condition)
                codes, layout = encoded.codes[:, : way.num_kept], Ordered(way.num_kept)
                decoded = tokenizer.decode(codes, layout, encoded.grid_shape, noise, condition)
            else:
                decoded = tokenizer.reconstruct(embedded, *way, noise, condition).image
        return decoded.float().cpu()

    def is_ordered(self) -> bool:
        """Whether tokens come in an order, of which the first are enough."""
        config = self.tokenizer.config
        shape = (config.grid_size, config.grid_size)
        implied = self.tokenizer.encoder.reducer.implied(shape, config.num_kept, 1)
        return isinstance(implied, Ordered)

    @property
    def side(self) -> int:
        """Side of the images that the tokenizer was trained at, in pixels."""
        return self.tokenizer.config.image_size


def open_passes(through: Reconstructor) -> Passes:
    """Load the tokenizer.

    Raises:
        ValueError: it is not there.
        RuntimeError: a file is damaged.
    """
    device, directory = resolve_device(through.device), resolve(through.model)
    tokenizer = Tokenizer.from_pretrained(
        directory, precision=through.precision, device=device, decoder=through.decoder
    )
    sources: list[RecoverySource] = ["given", *(["recovered"] if tokenizer.has_maps else [])]
    return Passes(
        tokenizer=tokenizer,
        record={
            "path": through.model,
            "hash": model_hash(directory),
            "config": to_json(tokenizer.config),
        },
        device=device,
        precision=resolve_precision(through.precision, device),
        ways=[
            Way(num_kept, source)
            for num_kept in dict.fromkeys(through.num_kept or (tokenizer.config.num_kept,))
            for source in sources
        ],
    )


def degraded(pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
    """An image at half of its side and back, bicubic: which any measure must find worse."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return to_uint8(to_tensor(half.resize(image.size, Image.Resampling.BICUBIC)))
