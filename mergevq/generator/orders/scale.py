"""Order of scales: all tokens of a scale at once, from the sum of the scales before it.

Source: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", section 3 (arXiv:2404.02905).

    [class, M, s_1, s_2 s_2 .., s_3 s_3 s_3 ..]

M is the merge instruction, an embedding of K. The input of a token is the mean, over its area of
the grid, of the sum that the codes of all coarser scales make (`nn.conv.scale_sums`, with the codes
and filters of the tokenizer), plus a vector of its scale; its state predicts it. An input sees all
of its own scale and of coarser ones, and tokens of one scale do not know of each other.

Differs: the first scale has inputs of its own behind the prefix, so that it may have several
tokens; positions are rotations by the middle of a token's area, in cells of the grid; guidance
rises with the share of scales that are decoded, and in the last is a little below its end.

Shape letters: B images, R rows (B, or 2B with guidance: conditional ones first), T tokens of a
sequence, P parts of a token, C channels, S scales, V codes, D channels of a code, N inputs.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
)
from mergevq.config.parts import orders as config
from mergevq.generator.decoding import full_cache
from mergevq.generator.network import INITIAL_STD, Network
from mergevq.generator.sampling import guidance_scales
from mergevq.generator.seams import Decoder, Draws, Layout, Numbers, Sampled, Sequences
from mergevq.nn.attention import level_mask
from mergevq.nn.conv import scale_sums, to_scale

_CODE_STD = 0.3
"""Deviation of the codes that stand in for those of a tokenizer."""


class Scale(nn.Module):
    """Tokens of a grid at several scales, the coarsest first (`seams.Order`)."""

    codes: Float[Tensor, "v d"]
    """Codes of the tokenizer."""
    kernels: Float[Tensor, "s d d 3 3"]
    """Its filter of each scale."""

    def __init__(self, order: config.Scale, sizes: GeneratorConfig) -> None:
        """Make the embeddings; codes and filters are stand-ins until `take_codes`."""
        super().__init__()
        self.scales = order.scales_of(sizes.grid_size[0])
        dim, count = order.code_dim, len(self.scales)
        self.from_codes = nn.Linear(dim, sizes.dim, bias=False)
        self.levels = nn.Parameter(torch.empty(count, sizes.dim))
        self.register_buffer("codes", torch.empty(sizes.num_codes, dim))
        self.register_buffer("kernels", torch.empty(count, dim, dim, 3, 3))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the embeddings anew, and stand-ins of codes; filters change nothing."""
        for weight in (self.from_codes.weight, self.levels):
            nn.init.normal_(weight, std=INITIAL_STD, generator=generator)
        nn.init.normal_(self.codes, std=_CODE_STD, generator=generator)
        for kernel in self.kernels:
            nn.init.dirac_(kernel)

    @torch.no_grad()
    def take_codes(
        self,
        scales: tuple[int, ...],
        codes: Float[Tensor, "v d"],
        kernels: Float[Tensor, "s d d 3 3"],
    ) -> None:
        """Copy what the sums are made of from the tokenizer of the tokens.

        Raises:
            ValueError: it has other scales, or codes of another number or width.
        """
        if scales != self.scales:
            raise ValueError(
                f"model.order.scales {self.scales} must be {scales}, as in the tokenizer"
            )
        if codes.shape != self.codes.shape:
            raise ValueError(
                f"codes {tuple(self.codes.shape)} must be {tuple(codes.shape)}, number and "
                "channels, as in the tokenizer: change model.head.sizes or model.order.code_dim"
            )
        self.codes.copy_(codes)
        self.kernels.copy_(kernels)

    def draw(self, sequences: Sequences, numbers: Numbers) -> Sequences:  # noqa: ARG002
        """The same: nothing about the order is random."""
        return sequences

    def num_inputs(self, config: GeneratorConfig, num_kept: int) -> int:
        """The prefix, and one for each token."""
        return config.num_prefix + num_kept

    def parts(
        self,
        codes: Int64[Tensor, "b t f"],
        sequences: Sequences,  # noqa: ARG002
        config: GeneratorConfig,  # noqa: ARG002
    ) -> Int64[Tensor, "b t p"]:
        """The sub-indices alone."""
        return codes

    def layout(
        self, network: Network, parts: Int64[Tensor, "b t p"], sequences: Sequences
    ) -> Layout:
        """The prefix and an input for each token; those of one scale see each other."""
        device = network.device
        prefix = network.embed_prefix(sequences.class_label, sequences.num_kept)
        count = self.num_scales(parts.shape[1])
        means = self.means(network, parts, range(count))
        inputs = [self.embed(network, each, scale) for scale, each in enumerate(means)]
        positions = torch.cat([self.positions(scale, device) for scale in range(count)])
        sides = torch.tensor(self.scales[:count]).to(device, non_blocking=True)
        levels = torch.arange(count, device=device).repeat_interleave(sides**2)
        end = prefix.shape[1] + parts.shape[1]
        return Layout(
            inputs=torch.cat([prefix, *inputs], dim=1)[:, :end],
            positions=torch.cat([positions.new_zeros(prefix.shape[1], 2), positions])[None, :end],
            mask=level_mask(torch.cat([levels.new_zeros(prefix.shape[1]), levels])[:end])[None],
            reads=torch.arange(prefix.shape[1], end, device=device),
            parts=parts,
            targets=parts,
            allowed={},
            slots=None,
        )

    def num_scales(self, num_tokens: int) -> int:
        """Scales that the first tokens are of."""
        return sum(start < num_tokens for start in self.starts)

    @property
    def starts(self) -> list[int]:
        """Number of the first token of each scale."""
        return [sum(side**2 for side in self.scales[:scale]) for scale in range(len(self.scales))]

    def means(
        self, network: Network, parts: Int64[Tensor, "b t p"], scales: range
    ) -> list[Float[Tensor, "b _ d"]]:
        """Area means for the tokens of some scales: of the sums over all coarser scales.

        Args:
            network: of whose tokens these are.
            parts: the first tokens; those of other than coarser scales are without effect.
            scales: numbers of scales.
        """
        codes = self.codes.float()[network.indices(parts)]
        sums = list(scale_sums(codes, self.scales, self.kernels))
        sums = [torch.zeros_like(sums[0]), *sums]
        return [to_scale(sums[scale], self.scales[scale]) for scale in scales]

    def embed(
        self, network: Network, means: Float[Tensor, "b n d"], scale: int
    ) -> Float[Tensor, "b n c"]:
        """Inputs of the tokens of a scale."""
        return self.from_codes(means.to(network.dtype)) + self.levels[scale]

    def positions(self, scale: int, device: torch.device) -> Float[Tensor, "n 2"]:
        """Row and column of the middle of each token's area; of the last scale those of cells."""
        side, grid = self.scales[scale], self.scales[-1]
        middles = (torch.arange(side, device=device) + 0.5) * (grid / side) + 0.5
        return torch.cartesian_prod(middles, middles).view(-1, 2)

    def decoder(
        self,
        network: Network,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> "ScalesDecoder":
        """One scale in each step."""
        return ScalesDecoder(network, self, labels, num_kept, draws, settings)

    def sampled(self, network: Network, decoder: Decoder) -> Sampled:
        """Tokens of all scales, the coarsest first."""
        indices = network.indices(decoder.parts())
        return Sampled(indices, None, None, decoder.num_steps, decoder.kv_bytes)


class ScalesDecoder:
    """Sequences of which a scale is decoded in each step (`seams.Decoder`)."""

    def __init__(
        self,
        network: Network,
        order: Scale,
        labels: Int64[Tensor, "b"],
        num_kept: int,
        draws: Draws,
        settings: SamplingSettings,
    ) -> None:
        """Allocate the cache.

        Args:
            network: what decodes.
            order: whose sequences these are.
            labels: classes.
            num_kept: K.
            draws: uniform numbers for every token of a sequence.
            settings: guidance, temperature and so on.
        """
        self.network, self.order, self.num_kept = network, order, num_kept
        self.draws, self.settings = draws, settings
        self.num_steps = order.num_scales(num_kept)
        self.bounds = [*order.starts[: self.num_steps], num_kept]
        self.scales = guidance_scales(settings, range(self.num_steps), self.num_steps)
        self.rows = network.with_unconditional(labels, self.scales)
        self.cache = full_cache(network, len(self.rows), num_kept)
        self.kv_bytes = self.cache.num_bytes
        self.memory = (self.cache.keys, self.cache.values)
        self.finite: list[Tensor] = []

    def parts(self) -> Int64[Tensor, "b t p"]:
        """Tokens of all scales; zeros where none is decoded yet."""
        return self.tokens

    def known(self) -> Bool[Tensor, "b t"]:
        """The first ones."""
        places = torch.arange(self.num_kept, device=self.tokens.device)
        return (places < self.bounds[self.number]).expand(len(self.tokens), -1)

    @torch.inference_mode()
    def seek(self, step: int, history: Int64[Tensor, "b t p"] | None = None) -> None:
        """Take the scales before a step as decoded and put in (`seams.Decoder`)."""
        shape = *self.draws.uniforms.shape[:2], len(self.network.config.part_sizes)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.network.device)
        if history is not None:
            self.tokens[:, : self.bounds[step]] = history[:, : self.bounds[step]]
        self.cache.reset()
        if step:
            self.cache.advance(self.network.config.num_prefix + self.bounds[step])
        self.number = step

    @torch.inference_mode()
    def step(self) -> None:
        """Choose all tokens of the next scale, of each image."""
        network, scale, batch = self.network, self.number, len(self.tokens)
        start, end = self.bounds[scale : scale + 2]
        (means,) = self.order.means(network, self.tokens[:, :start], range(scale, scale + 1))
        inputs = self.order.embed(network, means[:, : end - start], scale)
        inputs = inputs.repeat(len(self.rows) // batch, 1, 1)
        positions = self.order.positions(scale, network.device)[: end - start]
        if scale == 0:
            prefix = network.embed_prefix(self.rows, self.num_kept)
            inputs = torch.cat([prefix, inputs], dim=1)
            positions = torch.cat([positions.new_zeros(prefix.shape[1], 2), positions])
        # Without a mask, several inputs would see those before them alone.
        count = inputs.shape[1]
        shape = 1, count, self.cache.length + count
        mask = torch.ones(shape, dtype=torch.bool, device=network.device)
        states = network.transform(inputs, network.turns(positions[None]), mask, self.cache)
        self.cache.advance(count)
        chosen = network.choose(
            states[:, start - end :].flatten(0, 1),
            self.draws.uniforms[:, start:end].flatten(0, 1),
            self.scales[scale],
            self.settings,
        )
        self.finite += chosen.finite
        self.tokens[:, start:end] = chosen.parts.unflatten(0, (batch, end - start))
        self.number = scale + 1
