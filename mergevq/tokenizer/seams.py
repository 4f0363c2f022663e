"""Interfaces of a tokenizer's parts: every part is a module that satisfies one of them.

There is no base class. `mergevq.tokenizer.build` returns each part as its interface, which is where
types are checked, and tests/contracts runs every kind of part through one suite.

Shape letters: B batch, L grid cells, K kept tokens, N tokens that a decoder is given, C channels of
the encoder, D channels of codes, E channels of latents or those that a decoder is given, P parts of
a token.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.data.batches import Batch
from mergevq.data.codes import CodeSpec, join
from mergevq.data.layouts import Layout, Source, require_source

Condition = Int64[Tensor, "b"] | Float[Tensor, "b t c"]
"""Known of images besides their tokens: classes, -1 for none; or embeddings, zeros for none."""


class Told(NamedTuple):
    """Tokens of a condition, which a part sees beside its own."""

    tokens: Float[Tensor, "b t e"]
    """Vectors of the part's width."""
    present: Bool[Tensor, "b t"]
    """Which of them are seen."""


class TokenSet(NamedTuple):
    """Tokens after some of the encoder's blocks."""

    tokens: Float[Tensor, "b k c"]
    """Kept tokens, in the order of the layout."""
    class_token: Float[Tensor, "b c"]
    """The encoder's summary of the image."""
    layout: Layout
    """Places of the tokens."""
    taps: tuple[Float[Tensor, "b k c"], ...] = ()
    """The same tokens as earlier blocks had them: means over the cells of each, where tokens were
    merged later; of ordered tokens, their own."""
    losses: Mapping[str, Float[Tensor, ""]] | None = None
    """Losses of the reducer's own in training, unweighted, by name; None is none."""


class Quantized(NamedTuple):
    """Tokens after quantization."""

    codes: Float[Tensor, "*b d"]
    """Values that a decoder reads, about in [-1, 1], as bounded latents stand for them before
    quantization starts; gradients pass to the latents."""
    parts: Int64[Tensor, "*b p"]
    """The same tokens as whole numbers, one for each part; none of real numbers."""


class Given(NamedTuple):
    """Input of a decoder: an embedding for each cell of a grid."""

    tokens: Float[Tensor, "b l e"]
    """Embeddings, in raster order."""
    grid_shape: tuple[int, int]
    """(height, width) in cells."""
    style: Float[Tensor, "b n d"] | None
    """Codes whose mean and deviation over N set the style of adaptive norms; None is no style."""


class Expanded(NamedTuple):
    """One training pass of an expander."""

    given: Given
    """Input of the decoder."""
    losses: Mapping[str, Float[Tensor, ""]]
    """Losses of the expander's own, unweighted, by name."""


class Encoded(NamedTuple):
    """An image as tokens: everything `Tokenizer.decode` needs, and what they were made from."""

    codes: Float[Tensor, "b k d"]
    """Values that a decoder reads, in the order of the layout; of bits, signs in {-1, +1}."""
    parts: Int64[Tensor, "b k p"]
    """The same as whole numbers from 0, one for each part of a token; none of real numbers."""
    layout: Layout
    """Places of the tokens; of a merging tokenizer the source map."""
    grid_shape: tuple[int, int]
    """(height, width) in cells; their product is L."""
    class_token: Float[Tensor, "b c"]
    """The encoder's summary, aligned with the teacher unless semantic codes are."""
    latents: Float[Tensor, "b n e"]
    """Before quantization: of the K tokens, or of the cells that a quantizer lays out anew."""
    sizes: tuple[int, ...]
    """Values of each part; () of real numbers."""

    @property
    def indices(self) -> Int64[Tensor, "b k"]:
        """The parts of a token in one number; a ValueError above 63 bits, and of real numbers."""
        return join(self.parts, self.sizes)

    @property
    def source(self) -> Source:
        """Which kept token each grid cell went into; a ValueError without a source map."""
        return require_source(self.layout, "source")


class Reconstruction(NamedTuple):
    """An image decoded from its own tokens."""

    image: Float[Tensor, "b 3 h w"]
    """In about [-1, 1], not clamped."""
    encoded: Encoded
    """Its tokens, with the layout that was given."""
    layout: Layout
    """The layout that was decoded with: given or recovered."""

    @property
    def source(self) -> Source:
        """The source map that was decoded with; a ValueError without one."""
        return require_source(self.layout, "source")


class TokenizerOutput(NamedTuple):
    """One training pass."""

    reconstruction: Float[Tensor, "b 3 h w"]
    """Decoded with the given source, or with the recovered one where that was asked for."""
    encoded: Encoded
    """Tokens of the image."""
    losses: Mapping[str, Float[Tensor, ""]]
    """Losses of quantizer, expander and reducer, unweighted, by name."""
    summary: Float[Tensor, "b c"]
    """Summary for the teacher, of the image or of the alignment view where there is one: the class
    token, or of two branches the mean of the semantic codes."""
    decoded: Float[Tensor, "b l e"] | None = None
    """Tokens of the grid after one of the decoder's blocks, where they were asked for."""


class Stem(Protocol):
    """Pixels to a grid of channels."""

    def __call__(self, image: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b c gh gw"]:
        """Channels of each cell of an image in [-1, 1]."""
        ...


class Reducer(Protocol):
    """Grid tokens to kept tokens: the encoder's transformer."""

    blocks: nn.ModuleList
    """Transformer blocks, each with the branches `ls1` and `ls2`."""
    checkpointing: bool
    """Recompute the blocks in the backward pass."""

    def __call__(
        self,
        grid: Float[Tensor, "b l c"],
        class_token: Float[Tensor, "b 1 c"],
        grid_shape: tuple[int, int],
        num_kept: int,
        *,
        num_layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> TokenSet:
        """Run the first `num_layers` blocks (None: all) on the way to `num_kept` tokens.

        `taps` numbers blocks, from 1, whose tokens are returned too, and 0 is before the first;
        they are there where all blocks are run.
        """
        ...

    def implied(
        self, grid_shape: tuple[int, int], num_kept: int, num_images: int, /
    ) -> Layout | None:
        """The layout that grid and K imply, for each of the images; None where images differ."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Latents to codes, in float32 under any autocast."""

    spec: CodeSpec
    """Parts of a token, and the channels of its latents."""
    is_random: ClassVar[bool]
    """Whether training draws."""

    def __call__(
        self,
        latents: Float[Tensor, "*b e"],
        uniforms: Float[Tensor, "*b d"] | None = None,
        /,
    ) -> Quantized:
        """Quantize; `decode` gives the same codes of the parts, bit for bit.

        A kind of real numbers gives no parts, and `decode` and `near` are a ValueError. One that
        lays tokens out (`LaysOut`) gives others than as many as there are latents.

        Args:
            latents: any real values, of `TokenizerConfig.latent_dim` channels.
            uniforms: numbers in [0, 1) of a step of training, for a kind that draws; None draws
                nothing.
        """
        ...

    def decode(self, parts: Int64[Tensor, "*b p"], /) -> Float[Tensor, "*b d"]:
        """Codes of tokens in float32; a part that does not exist is a ValueError."""
        ...

    def near(
        self,
        parts: Int64[Tensor, "*b p"],
        uniforms: Float[Tensor, "*b n"],
        num_near: Float[Tensor, ""],
        /,
    ) -> Int64[Tensor, "*b p"]:
        """Another token for each, drawn from those near it: never the token itself.

        Args:
            parts: tokens.
            uniforms: D + 1 numbers in [0, 1) for each token.
            num_near: size of the neighbourhood, in entries of a codebook of 4,096; a kind whose
                neighbours are a few all the same takes those.
        """
        ...

    def losses(self, latents: Float[Tensor, "b k e"], /) -> Mapping[str, Float[Tensor, ""]]:
        """Unweighted terms by name.

        The weight of `commitment` and `entropy` is in `LossConfig`, that of a term which only this
        kind has in its settings, as `NAME_weight`. A term that is no mean over images takes its
        means over all ranks.
        """
        ...


@runtime_checkable
class Follower(Protocol):
    """A quantizer with codes that are no weights: they follow the latents of each step."""

    def statistics(
        self, latents: Float[Tensor, "n d"], parts: Int64[Tensor, "m p"], generator: torch.Generator
    ) -> list[Float[Tensor, "v c"]]:
        """Numbers of a step that codes follow, to be summed over ranks; none where codes stay.

        Args:
            latents: of this rank's tokens, image after image, as many on every rank.
            parts: the same tokens quantized; of a kind that lays tokens out, those that are kept.
            generator: draws for the step, the same numbers on every rank.
        """
        ...

    def follow(self, statistics: Sequence[Float[Tensor, "v c"]]) -> None:
        """Move codes after a step of training that was taken, by the sums of `statistics`."""
        ...


@runtime_checkable
class LaysOut(Protocol):
    """A quantizer of all cells of a grid whose tokens are others than those cells.

    It gives the most that there are, of which the first K are kept: they are those of a smaller K.
    """

    def implied(self, grid_shape: tuple[int, int], num_kept: int, num_images: int, /) -> Layout:
        """The layout of K tokens, for each of the images (`Reducer.implied`)."""
        ...


class Regularized(NamedTuple):
    """Tokens for the expander."""

    codes: Float[Tensor, "b k d"]
    """Codes, through which gradients pass to the latents."""
    lengths: Int64[Tensor, "b"] | None
    """Tokens that each image has, the first of its codes; None is all."""


class StepDraws(NamedTuple):
    """Numbers that a regularizer goes by in a step of training, for the images at hand.

    All are tensors, so that a compiled graph serves every step.
    """

    images: Float[Tensor, "b"]
    """A number in [0, 1) for each image, spread evenly over the whole batch."""
    tokens: Float[Tensor, "b k n"]
    """Numbers in [0, 1) for each token, `Regularizer.num_draws` of them."""
    progress: Float[Tensor, ""]
    """Share of the run that is over."""


@runtime_checkable
class Regularizer(Protocol):
    """Codes to those that an expander is given, in training alone.

    Losses of the quantizer and use of the codebook are those of the codes before it.
    """

    def num_draws(self, spec: CodeSpec, /) -> int:
        """Numbers that it takes for each token."""
        ...

    def __call__(
        self, quantized: Quantized, /, *, quantizer: Quantizer, draws: StepDraws
    ) -> Regularized:
        """Tokens for the expander.

        Args:
            quantized: tokens of the images.
            quantizer: theirs.
            draws: of the step.
        """
        ...


class Expander(Protocol):
    """Codes to the input of a decoder."""

    can_infer: ClassVar[bool]
    """Whether a layout can be inferred from codes, so that there is a recovered one."""

    def __call__(
        self,
        codes: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        condition: Condition | None = None,
    ) -> Given:
        """Input of a decoder; only kinds for ordered tokens take a condition."""
        ...

    def train_pass(
        self,
        codes: Float[Tensor, "b k d"],
        seen: Float[Tensor, "b k d"],
        layout: Layout,
        grid_shape: tuple[int, int],
        *,
        inferred: Bool[Tensor, "b"] | None,
        lengths: Int64[Tensor, "b"] | None = None,
        condition: Condition | None = None,
    ) -> Expanded:
        """Expand in training: every parameter takes part in the result.

        Args:
            codes: values that are expanded.
            seen: values that a layout is inferred from, whose gradient may be a share.
            layout: the encoder's.
            grid_shape: (height, width) in cells.
            inferred: images that are expanded by the inferred layout; None is none.
            lengths: tokens of each image, the first ones; no other has any effect. None is all;
                with a source map, all are there.
            condition: as of a call.
        """
        ...

    def infer(
        self,
        codes: Float[Tensor, "b k d"],
        grid_shape: tuple[int, int],
        anchors: Int64[Tensor, "b k"] | None = None,
    ) -> Layout:
        """Infer the layout from codes; a ValueError where it cannot be."""
        ...


class Decoder(Protocol):
    """The grid to pixels."""

    checkpointing: bool
    """Recompute in the backward pass."""

    def __call__(
        self, given: Given, /, outputs: dict[int, Tensor] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode to an image in about [-1, 1].

        `outputs` gets the tokens (B, L, E) after the blocks that it has numbers of, from 1; 0 is
        before them.
        """
        ...


@runtime_checkable
class Term(Protocol):
    """A further term of the tokenizer's loss, which is built where its weight is above 0."""

    name: ClassVar[str]
    """Its name, that of its settings in `LossConfig`."""

    def __call__(self, output: TokenizerOutput, batch: Batch, /) -> Float[Tensor, ""]:
        """The unweighted term of one part of a batch, in float32 under any autocast."""
        ...
