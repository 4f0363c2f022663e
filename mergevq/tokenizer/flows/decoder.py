"""A flow decoder beside a tokenizer: tokens to images, by noise that is tied to each image.

Source: Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with
Rectified Flow", section 2 (arXiv:2209.03003).

Shape letters: B batch, K kept tokens, D channels of codes, H and W pixels, S steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, assert_never, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.config.parts import flows as settings
from mergevq.config.parts.flows import FlowConfig, Groups
from mergevq.data.layouts import Layout, Ordered, Source
from mergevq.nn.flow import Guidance, solve, time_grid
from mergevq.runtime.artefacts import build_for, load_model, model_hash, resolve
from mergevq.runtime.device import decoded_at_once
from mergevq.runtime.random import step_generator
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.flows.pixel import PixelFlow
from mergevq.tokenizer.flows.prefix import PrefixFlow
from mergevq.tokenizer.flows.schedules import num_readable
from mergevq.tokenizer.flows.tokens import Embedded, Shown

KIND = "decoder"
"""Kind of the artefact."""


@runtime_checkable
class Flow(Protocol):
    """Velocities of pixels, given tokens."""

    checkpointing: bool
    """Recompute in the backward pass."""

    def read(self, shown: Shown, /) -> Embedded:
        """Read tokens, once for all times."""
        ...

    def __call__(
        self, x: Float[Tensor, "b 3 h w"], time: Float[Tensor, "b"], embedded: Embedded, /
    ) -> Float[Tensor, "b 3 h w"]:
        """Velocities at points and times."""
        ...


class Noise(NamedTuple):
    """Noise that images begin from: that of each depends on the seed and its number alone."""

    seed: int
    """Seed of all."""
    image_ids: Sequence[int]
    """Numbers of the images."""


class FlowNetwork(nn.Module):
    """A flow and the scale of its data: each colour has mean 0 and deviation 1 inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: FlowConfig) -> None:
        """Build with random weights, for data that have this scale already."""
        super().__init__()
        self.config = config
        self.flow = build_flow(config)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(
        self, x: Float[Tensor, "b 3 h w"], time: Float[Tensor, "b"], shown: Shown
    ) -> Float[Tensor, "b 3 h w"]:
        """Velocities in one training pass; of each image one or several points, round by round."""
        embedded = self.flow.read(shown)
        return self.flow(x, time, embedded.repeated(len(x) // len(shown.codes)))

    def scaled(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images as the flow has them."""
        return (image - self.mean[:, None, None]) / self.std[:, None, None]

    def unscaled(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Inverse of `scaled`."""
        return x * self.std[:, None, None] + self.mean[:, None, None]


class FlowDecoder:
    """A trained flow network, as `Tokenizer` holds it: it is no part of the tokenizer's weights."""

    def __init__(self, network: FlowNetwork, digest: str = "") -> None:
        """Hold the network, and the hash of its artefact, if it has one."""
        self.network = network
        self.digest = digest

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch, whose velocities are one output."""
        return self.network.config.decoder.patch_size

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, tokens_id: str, device: torch.device | str = "cpu"
    ) -> "FlowDecoder":
        """Load from a directory that `mergevq train` wrote.

        Args:
            path: the directory, or owner/name@revision on Hugging Face.
            tokens_id: hash of the tokenizer at hand (`runtime.artefacts.tokens_hash`).
            device: where to compute.

        Raises:
            ValueError: there is no decoder, or it reads another tokenizer's tokens.
        """
        directory = resolve(path)
        saved = load_model(directory, kind=KIND)
        wanted = saved.record["extra"].get("tokenizer")
        if wanted != tokens_id:
            raise ValueError(
                f"the decoder in {directory} was trained on tokens of tokenizer {wanted} and this "
                f"is {tokens_id}: a code means another thing to each; give the tokenizer that it "
                "was trained for"
            )
        config = from_json(FlowConfig, saved.record["config"])
        layers = _layers(config.decoder)
        network = build_for(lambda: FlowNetwork(config), saved.state, layers=layers)
        network.requires_grad_(requires_grad=False)
        return cls(network.eval().to(device), model_hash(directory))

    def preview(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],
        noise: Noise | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Images by the first ordered tokens alone, for a decoder that reads groups as noise falls.

        The flow is followed as long as all tokens that are read are there, and then in one step to
        the end: with all tokens this is `decode`, bit for bit.

        Args:
            codes: of the first tokens.
            grid_shape: (height, width) in cells.
            noise: see `decode`.

        Raises:
            ValueError: the decoder has another schedule, or tokens have a source map, or those of
                the first group are not all there.
        """
        config, count = self.network.config, codes.shape[1]
        schedule, slots = getattr(config.decoder, "schedule", None), config.num_slots
        if not isinstance(schedule, Groups) or slots is None:
            raise ValueError(
                "a preview needs ordered tokens, and a decoder with decoder.schedule.kind groups"
            )
        even = time_grid(config.solution.num_steps, config.solution.solver)
        readable = num_readable(schedule, even[:-1], count, slots)
        if readable == 0:
            raise ValueError(
                f"tokens ({count}) must be all of the first of {schedule.num_groups} groups of "
                f"{slots} for a preview"
            )
        return self.decode(codes, Ordered(count), grid_shape, noise, num_steps=readable)

    @torch.no_grad()
    def decode(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        noise: Noise | None = None,
        *,
        num_steps: int | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Follow the flow from noise to images, in about [-1, 1] and not clamped.

        Args:
            codes: as the tokenizer's own decoder is given them.
            layout: places of the tokens.
            grid_shape: (height, width) in cells.
            noise: seed and numbers of the images; None is seed 0 and their places in the batch.
            num_steps: steps after which the rest is one, with the last of them; None is all.

        Raises:
            ValueError: there are more tokens than the decoder was trained with, or not as many
                numbers as images.
        """
        noise = noise or Noise(0, range(len(codes)))
        if len(noise.image_ids) != len(codes):
            raise ValueError(
                f"image_ids ({len(noise.image_ids)}) must be as many as images ({len(codes)})"
            )
        codes = codes.float()
        # It is no part of the tokenizer, and so does not move with it.
        self.network.to(codes.device)
        cell = self.network.config.cell_size
        height, width = grid_shape[0] * cell, grid_shape[1] * cell
        size = decoded_at_once(height * width, codes.device)
        images = []
        for first in range(0, len(codes), size):
            # As many at once whatever the batch, so that an image is the same to the last bit in
            # any: where images run out, the last is decoded several times.
            places = [min(row, len(codes) - 1) for row in range(first, first + size)]
            rows = torch.tensor(places, device=codes.device)
            shown = Shown(codes[rows], _rows(layout, rows), grid_shape)
            drawn = self._draw(noise.seed, [noise.image_ids[i] for i in places], height, width)
            images.append(self._solve(shown, drawn.to(codes), num_steps)[: len(codes) - first])
        return torch.cat(images)

    def _draw(
        self, seed: int, image_ids: Sequence[int], height: int, width: int
    ) -> Float[Tensor, "s b 3 h w"]:
        """The first points of images, and the noise that a stochastic solver adds on the way."""
        solution = self.network.config.solution
        count = solution.num_steps if solution.solver == "sde" else 1
        shape = (count, 3, height, width)
        each = [torch.randn(shape, generator=step_generator(seed, "flow", i)) for i in image_ids]
        return torch.stack(each, dim=1)

    def _solve(
        self, shown: Shown, noise: Float[Tensor, "s b 3 h w"], num_steps: int | None
    ) -> Float[Tensor, "b 3 h w"]:
        """Images of one batch."""
        config, flow = self.network.config, self.network.flow
        solution = config.solution
        embedded, guided = flow.read(shown), solution.guidance_scale != 1
        without = flow.read(shown.without()) if guided else embedded
        guide = Guidance(solution.guidance_scale, projected=solution.projected)

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(x),), time, device=x.device)
            found = flow(x, times, embedded)
            return guide(found, flow(x, times, without)) if guided else found

        times = time_grid(solution.num_steps, solution.solver, config.times.shift)
        times = [*times[:-1][:num_steps], times[-1]]
        x = solve(velocity, noise[0], times, solution.solver, list(noise[1:]))
        return self.network.unscaled(x)


def build_flow(config: FlowConfig) -> PrefixFlow | PixelFlow:
    """Flow of a kind; it satisfies `Flow`."""
    match config.decoder:
        case settings.PrefixFlow():
            return PrefixFlow(config, config.decoder)
        case settings.PixelFlow():
            return PixelFlow(config, config.decoder)
        case _:
            assert_never(config.decoder)


def _layers(decoder: settings.FlowDecoder) -> dict[str, int]:
    """Settings that say how many modules a decoder has, by their names."""
    names = ("num_layers", "num_token_layers", "num_global_layers", "depth")
    return {f"decoder.{name}": getattr(decoder, name, 0) for name in names}


def _rows(layout: Layout, rows: Tensor) -> Layout:
    """The layout of some images of a batch."""
    if isinstance(layout, Source):
        return Source(layout.index[rows], layout.num_kept)
    return layout
