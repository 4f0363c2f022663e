"""Settings of a generator, its sizes, and settings of sampling; no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from mergevq.config.base import Device, require
from mergevq.config.ranges import check_numbers

GuidanceSchedule = Literal["constant", "linear", "cosine", "power"]
Weights = Literal["float32", "bf16", "int8"]
_MIN_TEMPERATURE = 1e-3
"""Below this a draw is the most likely value, to the precision of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """Architecture of a generator: a Llama-style transformer over indices, and its order.

    Class ids are 0 to `num_classes - 1`; `null_class` is the id of "no class". Both live in a
    table of their own, so no special id is ever in the range of the codes.
    """

    order: Literal["raster", "merge", "random", "anchor"] = "merge"
    """Order of a sequence: all L cells in raster order (`raster`, LlamaGen), the same with merged
    duplicates hidden (`merge`, MergeAR), the K kept tokens in random order (`random`, RandAR), or
    in canonical order with the cell each opens at (`anchor`)."""
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
    num_head_layers: int = 1
    """Transformer blocks over the parts of one token, each part conditioned on those before it."""
    num_classes: int = 0
    """Classes of the data; 0 is an unconditional generator."""
    grid_size: tuple[int, int] = (16, 16)
    """Rows and columns of the tokenizer's grid."""
    num_kept: int = 144
    """Nominal K."""
    kept_candidates: tuple[int, ...] = (144,)
    """The K a sequence may have: one merge-instruction embedding each. Empty leaves that token out
    of the prefix, which only order `raster` allows."""
    window: int = 2
    """In order `merge` duplicates stay visible to so many tokens after them."""
    merge_groups: Literal["code", "source"] = "code"
    """In order `merge` tokens are duplicates when their codes are equal, as in sampling, or (in
    training only) when the tokenizer merged them."""
    rotate_instruction: bool = True
    """In order `random` a position-instruction vector is itself rotated by its slot, besides the
    rotation that every query and key gets."""
    num_bits: int = 18
    """D: bits of a token, as in the tokenizer."""
    factor_bits: tuple[int, ...] = (9, 9)
    """Bits of each sub-index, lowest first; the authors have (6, 12)."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    dropout: float = 0.1
    """On the input, after each attention and after each feed-forward layer."""
    class_dropout: float = 0.1
    """Probability that training replaces a label by `null_class`, which guidance needs."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    flex_attention: bool = False
    """In order `merge` train with a compiled block mask on CUDA; other devices ignore it."""

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
            sum(self.factor_bits) == self.num_bits,
            f"factor_bits {self.factor_bits} must sum to num_bits ({self.num_bits})",
        )
        self._check_kept()

    def _check_kept(self) -> None:
        """Reject a K that the grid does not have, or that has no embedding."""
        for num_kept in (self.num_kept, *self.kept_candidates):
            require(
                1 <= num_kept <= self.num_tokens,
                f"num_kept ({num_kept}) must be between 1 and the {self.num_tokens} cells of the "
                f"{self.grid_size[0]} x {self.grid_size[1]} grid",
            )
        require(
            self.num_kept in self.kept_candidates
            or (self.order == "raster" and not self.kept_candidates),
            f"num_kept ({self.num_kept}) must be one of kept_candidates {self.kept_candidates}",
        )

    @property
    def num_tokens(self) -> int:
        """L: cells of the grid."""
        return self.grid_size[0] * self.grid_size[1]

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
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts predicted for one token, in order."""
        subindices = tuple(f"subindex_{number}" for number in range(1, len(self.factor_bits) + 1))
        return ("anchor", *subindices) if self.order == "anchor" else subindices

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Number of values of each part; an anchor is one of the cells."""
        subindices = tuple(2**bits for bits in self.factor_bits)
        return (self.num_tokens, *subindices) if self.order == "anchor" else subindices


GENERATOR_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 128, "num_layers": 4, "num_heads": 4, "num_head_layers": 1},
    "small": {"dim": 384, "num_layers": 8, "num_heads": 6, "num_head_layers": 1},
    "B": {"dim": 768, "num_layers": 14, "num_heads": 12, "num_head_layers": 1},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16, "num_head_layers": 2},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20, "num_head_layers": 2},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24, "num_head_layers": 2},
}
"""Shapes for `replace(config, **GENERATOR_SIZES["L"])`. B to XXL have as many parameters as
LlamaGen's; those of its two tables of codes are in the head's blocks, and in B in two layers."""


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
    budget: bool = True
    """In order `merge` hold a sample to K distinct tokens, so that its cache has K slots; without
    it the cache has a slot for every cell."""
    num_steps: int | None = None
    """In order `random` forward passes, several tokens in each; None is one token a pass."""

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
    """Directory of the generator, or owner/name@revision on Hugging Face."""
    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer of its tokens, or owner/name@revision on Hugging Face."""
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


def _each(setting: float | int | tuple[float | int, ...]) -> tuple[float | int, ...]:
    """The numbers of a setting that may be one or several."""
    return setting if isinstance(setting, tuple) else (setting,)
