"""Settings of a generator and of its sizes, and settings of sampling; no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from mergevq.config.base import Device, Precision, require
from mergevq.config.parts import num_kept_of
from mergevq.config.parts.heads import Bits, Head, Subindices
from mergevq.config.parts.orders import NUM_RELATIONS, Holistic, Masked, Merge, Order, Scale
from mergevq.config.ranges import check_numbers

GuidanceSchedule = Literal["constant", "linear", "cosine", "power"]
Weights = Literal["float32", "fp16", "bf16", "int8"]
AnyWeights = Literal["auto", "float32", "fp16", "bf16", "int8"]
"""Weights, or those that are fastest on a device."""
_MIN_TEMPERATURE = 1e-3
"""Below this a draw is the most likely value, to the precision of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """Architecture of a generator: a Llama-style transformer over indices, its order and head.

    Class ids are 0 to `num_classes - 1`; `null_class` is the id of "no class". Both live in a
    table of their own, so no special id is ever in the range of the codes.
    """

    order: Order = field(default_factory=Merge)
    """Order of a sequence and of decoding it."""
    head: Head = field(default_factory=Subindices)
    """Prediction of the parts of a token."""
    dim: int = 384
    """Width."""
    num_layers: int = 8
    """Transformer blocks."""
    num_heads: int = 6
    """Attention heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of queries; None is one for each query head."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward layers; None is 8/3 of the width, up to a multiple of 256.
    """
    num_classes: int = 0
    """Classes of the data; 0 is an unconditional generator."""
    grid_size: tuple[int, int] = (16, 16)
    """Rows and columns of the tokenizer's grid."""
    num_kept: int = 144
    """Nominal K."""
    kept_candidates: tuple[int, ...] = (144,)
    """The K a sequence may have: one merge-instruction embedding each. Empty leaves that token out
    of the prefix, which only order `raster` allows."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    dropout: float = 0.1
    """On the input, after each attention and after each feed-forward layer."""
    class_dropout: float = 0.1
    """Probability that training replaces a label by `null_class`, which guidance needs."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""

    def __post_init__(self) -> None:
        """Reject what cannot be built, naming both numbers."""
        check_numbers(self)
        require(
            self.dim % (4 * self.num_heads) == 0,
            f"dim ({self.dim}) must be a multiple of 4 times num_heads ({self.num_heads}): half of "
            "each head's channel pairs rotate by row, half by column",
        )
        require(
            self.num_heads % self.key_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.key_heads})",
        )
        require(
            self.num_tokens % self.order.tokens_per_step == 0,
            f"tokens_per_step ({self.order.tokens_per_step}) must divide the {self.num_tokens} "
            "cells of the grid",
        )
        require(
            not (isinstance(self.head, Bits) and self.head.masking == "mixed")
            or not isinstance(self.order, Masked),
            "head.masking (mixed) must be 'schedule' in order 'masked', which masks whole tokens",
        )
        if isinstance(self.order, Scale):
            self._check_scales(self.order)
        self._check_kept()

    def _check_scales(self, order: Scale) -> None:
        """Reject scales that do not end with the grid, and a head that reads all of a token."""
        rows, columns = self.grid_size
        scales = order.scales_of(rows)
        require(
            (rows, columns) == scales[-1:] * 2,
            f"order.scales {scales} must end with the side of a square grid, and the grid is "
            f"{rows} x {columns}",
        )
        require(
            not isinstance(self.head, Bits),
            "head.kind (bits) must be subindices or independent in order 'scale', whose tokens are "
            "not inputs: parts have no embeddings there but those that sub-indices read",
        )

    def _check_kept(self) -> None:
        """Reject a K that the grid does not have, or that has no embedding."""
        cells = f"{self.num_tokens} cells"
        if isinstance(self.order, Scale):
            cells = f"{self.most_kept} tokens of all scales"
        for num_kept in (self.num_kept, *self.kept_candidates):
            require(
                1 <= num_kept <= self.most_kept,
                f"num_kept ({num_kept}) must be between 1 and the {cells} of the "
                f"{self.grid_size[0]} x {self.grid_size[1]} grid"
                + f" and {self.num_holistic} tokens before them"
                * (self.num_holistic > 0),
            )
        require(
            self.num_kept in self.kept_candidates
            or not (self.order.merges or self.kept_candidates),
            f"num_kept ({self.num_kept}) must be one of kept_candidates {self.kept_candidates}",
        )

    @property
    def num_tokens(self) -> int:
        """L: cells of the grid."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_holistic(self) -> int:
        """H: tokens of the whole image, before those of cells."""
        return self.order.num_holistic if isinstance(self.order, Holistic) else 0

    @property
    def most_kept(self) -> int:
        """Largest K: the cells of the grid and tokens before them, or those of all scales."""
        if isinstance(self.order, Scale):
            return num_kept_of(self.order.scales_of(self.grid_size[0]))[-1]
        return self.num_holistic + self.num_tokens

    def length(self, num_kept: int) -> int:
        """Tokens of a sequence with K kept ones."""
        return self.num_tokens if self.order.reads == "cells" else num_kept

    def num_states(self, num_kept: int) -> int:
        """States of the transformer that predict a sequence with K kept tokens."""
        return self.length(num_kept) // self.order.tokens_per_step

    @property
    def null_class(self) -> int:
        """Id of "no class": the one after the last class."""
        return self.num_classes

    @property
    def num_prefix(self) -> int:
        """Tokens before the first image token: the class, and the K if there are candidates."""
        return 2 if self.kept_candidates else 1

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layers."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return math.ceil(int(8 * self.dim / 3) / 256) * 256

    @property
    def num_codes(self) -> int:
        """Tokens that exist."""
        return math.prod(self.head.sizes)

    @property
    def num_gap_bits(self) -> int:
        """Bits of a gap between anchors that are parts of a token, less 1: enough for any K."""
        if not self.order.gap_in_bits:
            return 0
        fewest = min(self.kept_candidates, default=self.num_kept)
        return (self.num_tokens - fewest).bit_length()

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts that one state predicts, in order."""
        names = tuple(f"subindex_{number}" for number in range(1, len(self.head.sizes) + 1))
        if self.order.is_anchored:
            bits = (f"gap_bit_{number}" for number in range(1, self.num_gap_bits + 1))
            names = (*bits, "anchor", *names)
        if self.order.names_copies:
            names = ("relation", "group", *names)
        count = self.order.tokens_per_step
        if count == 1:
            return names
        return tuple(f"{name}_of_{cell}" for cell in range(1, count + 1) for name in names)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Number of values of each part; an anchor is one of the cells."""
        sizes = self.head.sizes
        if self.order.is_anchored:
            sizes = (*(2,) * self.num_gap_bits, self.num_tokens, *sizes)
        if self.order.names_copies:
            sizes = (NUM_RELATIONS, max(self.kept_candidates), *sizes)
        return sizes * self.order.tokens_per_step

    @property
    def embedded_sizes(self) -> tuple[int, ...]:
        """Values of the parts with embeddings, which inputs and heads read.

        In order `scale`, whose inputs are sums of codes, those from which a head predicts others.
        """
        if not isinstance(self.order, Scale):
            return self.part_sizes
        return self.part_sizes[:-1] if isinstance(self.head, Subindices) else ()


class Size(NamedTuple):
    """Shape of a generator."""

    dim: int
    """Width."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads."""
    num_head_layers: int
    """Transformer blocks over the parts of a token."""


GENERATOR_SIZES: dict[str, Size] = {
    "tiny": Size(128, 4, 4, 1),
    "small": Size(384, 8, 6, 1),
    "B": Size(768, 14, 12, 1),
    "L": Size(1024, 24, 16, 2),
    "XL": Size(1280, 36, 20, 2),
    "XXL": Size(1536, 48, 24, 2),
}
"""Shapes by name; see `sized`. B to XXL have as many parameters as LlamaGen's; those of its two
tables of codes are in the head's blocks, and in B in two layers."""


def sized(config: GeneratorConfig, size: str) -> GeneratorConfig:
    """The same generator in a named size.

    Raises:
        ValueError: there is no such size.
    """
    if size not in GENERATOR_SIZES:
        raise ValueError(f"size ({size}) must be one of {', '.join(GENERATOR_SIZES)}")
    dim, num_layers, num_heads, num_head_layers = GENERATOR_SIZES[size]
    head = replace(config.head, num_layers=num_head_layers)
    return replace(config, dim=dim, num_layers=num_layers, num_heads=num_heads, head=head)


@dataclass(frozen=True, kw_only=True, slots=True)
class OneByOne:
    """One token in each pass, in order `scale` one scale."""

    kind: Literal["one"] = "one"
    budget: bool = True
    """In order `merge` hold a sample to K distinct tokens, so that its cache has K slots; without
    it the cache has a slot for every cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Several:
    """Several tokens in each pass, for orders `random` and `masked`."""

    kind: Literal["several"] = "several"
    num_steps: int = 8
    """Passes."""
    schedule: Literal["cosine", "arccos"] = "cosine"
    """Tokens known after a share s of the passes: 1 - cos(pi s / 2), few at first; or
    1 - arccos(s) / (pi / 2), nearly even but for many at the end (in order `masked` alone)."""
    confidence_temperature: float = 4.5
    """In order `masked`, scale of the noise on the confidence by which tokens are kept; it falls
    linearly to 0. 0 keeps the most confident."""

    def __post_init__(self) -> None:
        """Reject a number of passes below 1, and a negative scale."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafted:
    """Drafted tokens checked several in each pass, for orders `raster` and `merge`.

    A draft is accepted if it is what would be sampled in its place, so that images are those of one
    token in each pass.
    """

    kind: Literal["drafted"] = "drafted"
    draft: Literal["previous", "left", "above", "model"] = "previous"
    """Draft of a token: what was chosen there in the pass before, after a wrong draft; or the token
    of the cell to the left, or above it, and `left` where there is no other; or what a smaller
    generator chooses there by the same random numbers (`SampleRun.draft_generator`)."""
    num_drafted: int = 4
    """Tokens drafted for each pass, which decodes one more than it accepts."""
    budget: bool = True
    """As in `OneByOne`, without the smaller cache."""

    def __post_init__(self) -> None:
        """Reject passes without a draft."""
        check_numbers(self)


Passes = OneByOne | Several | Drafted
"""Tokens of a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How a generator is sampled.

    `temperature`, `top_k` and `top_p` are one number for every part of a token or one for each
    (`GeneratorConfig.part_names`).
    """

    guidance_scale: float = 1.0
    """Classifier-free guidance, where the schedule ends; 1 is none and runs one forward, 0 samples
    without the class."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the scale rises from 1 as the sequence grows; `constant` does not. After t of L tokens it
    is t / L of the way, so it ends just after the last token."""
    guidance_power: float = 2.0
    """Exponent of `power`."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the sequence that is guided; outside of it the scale is 1."""
    temperature: float | tuple[float, ...] = 1.0
    """0 takes the most likely value."""
    top_k: int | tuple[int, ...] = 0
    """Sample among the so many most likely values; 0 is all."""
    top_p: float | tuple[float, ...] = 1.0
    """Sample among the most likely values that together have this probability; 1 is all."""
    passes: Passes = field(default_factory=OneByOne)
    """Tokens decoded in one pass."""
    bits_order: Literal["schedule", "confidence"] = "schedule"
    """With head `bits`, order in which the bits of a token are chosen: block by block, or those of
    which the head is most confident first, as many as the block has (BAR). `temperature` then falls
    linearly over the blocks, and is the scale of noise on the confidence too."""
    candidates: int = 1
    """Samples drawn for each image, of which that one is kept which its class makes likeliest in
    proportion to its likelihood without a class (ILLUME)."""

    def __post_init__(self) -> None:
        """Reject what is no distribution."""
        check_numbers(self)
        low, high = self.guidance_interval
        require(
            low <= high,
            f"guidance_interval {self.guidance_interval} must be two shares of the sequence, "
            "from 0 to 1, in order",
        )
        for temperature in _each(self.temperature):
            require(
                temperature == 0 or temperature >= _MIN_TEMPERATURE,
                f"temperature ({temperature}) must be at least {_MIN_TEMPERATURE:g}, or 0, which "
                "takes the most likely value",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRun:
    """One run of `mergevq sample`: all that its images depend on."""

    model: str = "runs/generator/model"
    """Directory of the generator, its name in `mergevq models`, or owner/name@revision on Hugging
    Face."""
    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer of its tokens, a name, or owner/name@revision likewise."""
    decoder: str | None = None
    """Directory of a decoder that was trained for the tokenizer, or its id; None is the tokenizer's
    own."""
    draft_generator: str | None = None
    """Directory of a smaller generator of the same tokens in the same order, which drafts for the
    other, its name or owner/name@revision; of passes `drafted` with the draft `model` alone."""
    classes: tuple[int, ...] = ()
    """Class ids, one for each image in turn; none is every class there is."""
    num_images: int = 16
    """Images, numbered from 0."""
    num_kept: int | None = None
    """K, one of those trained on; None is the generator's own."""
    seed: int = 0
    """Image k depends on it and on k."""
    batch_size: int = 16
    """Images sampled at once."""
    weights: Weights = "float32"
    """Weights of the generator; fewer bits sample faster, and change what is sampled a little."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "float32"
    """Precision of the tokenizer that decodes."""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    """Guidance, temperature and so on."""
    keep_from: str | None = None
    """Image of which tokens are kept; order `random` only."""
    mask: str | None = None
    """Image as large: white where that one is made anew."""

    def __post_init__(self) -> None:
        """Reject counts below 1, and an image without a mask."""
        check_numbers(self)
        require(
            (self.keep_from is None) == (self.mask is None),
            f"keep_from ({self.keep_from}) and mask ({self.mask}) must be given together",
        )
        require(
            (self.draft_generator is not None) == is_drafted_by_model(self.settings),
            f"draft_generator ({self.draft_generator}) must be given with the draft 'model', and "
            "with that alone",
        )


def is_drafted_by_model(settings: SamplingSettings) -> bool:
    """Whether a second generator drafts."""
    return isinstance(settings.passes, Drafted) and settings.passes.draft == "model"


def check_sampling(config: GeneratorConfig, settings: SamplingSettings) -> None:
    """Check that a generator can sample as settings ask for.

    Raises:
        ValueError: it decodes another number of tokens in a pass, its head has no confidence, or
            its likelihoods cannot rank samples.
    """
    order, passes = config.order, settings.passes
    require(
        settings.candidates == 1 or order.is_exact,
        f"candidates ({settings.candidates}) must be 1 in order '{order.kind}', whose "
        "likelihoods are estimates",
    )
    require(
        order.in_parallel or not isinstance(passes, Several),
        f"passes.kind ({passes.kind}) must be 'one' in order '{order.kind}', which decodes one "
        "token in each pass",
    )
    require(
        order.drafts or not isinstance(passes, Drafted),
        f"passes.kind ({passes.kind}) must be 'one' in order '{order.kind}', whose tokens have no "
        "neighbours that are decoded before them; orders 'raster' and 'merge' have",
    )
    if settings.bits_order == "confidence":
        _check_confidence(config, settings)


def _check_confidence(config: GeneratorConfig, settings: SamplingSettings) -> None:
    """Reject an order of bits by confidence where it is not defined, or has no likelihood."""
    order, passes = config.order, settings.passes
    require(
        isinstance(config.head, Bits),
        f"bits_order ({settings.bits_order}) must be 'schedule' with head '{config.head.kind}', "
        "whose sub-indices are not masked",
    )
    require(
        not order.in_parallel,
        f"bits_order ({settings.bits_order}) must be 'schedule' in order '{order.kind}', which "
        "decodes several tokens in each pass",
    )
    require(
        not (isinstance(order, Merge) and not isinstance(passes, Several) and passes.budget),
        f"bits_order ({settings.bits_order}) must be 'schedule' where samples are held to K "
        "distinct tokens, whose sub-indices follow from those before; turn passes.budget off",
    )
    require(
        settings.candidates == 1,
        f"candidates ({settings.candidates}) must be 1 with bits_order "
        f"'{settings.bits_order}', whose samples have no known likelihood to be ranked by",
    )


def _each(setting: float | int | tuple[float | int, ...]) -> tuple[float | int, ...]:
    """The numbers of a setting that may be one or several."""
    return setting if isinstance(setting, tuple) else (setting,)
