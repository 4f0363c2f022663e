"""Every setting of every run, as frozen values that check themselves.

No torch in this file: the command line reads it before anything heavy is loaded. A recipe
(`mergevq.recipes`) is a function that returns a run, the command line overrides single fields, and
the result is written as JSON beside whatever it produced.

Rules: a count is `num_*`, `None` means off, a derived quantity is a property and never stored, and
`__post_init__` only validates.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal

FORMAT_VERSION = 1
"""Version of `config.json`; raised when a field changes its meaning."""

MAX_PIXELS = 89_478_485
"""Largest picture that is read by default, as width times height: 256 MiB in 8-bit RGB."""

Precision = Literal["auto", "bf16", "float32", "float16"]
MergeShape = Literal["linear", "square", "constant"]
Device = Literal["auto", "cpu", "cuda", "mps"]
SizePolicy = Literal["error", "resize", "tile"]
"""What to do with a picture the tokenizer was not trained on the size of.

`error` takes only multiples of the patch size, and else names some. `resize` gives it about as many
pixels as a training image has, in its own aspect ratio. `tile` cuts it into overlapping
training-sized tiles, each with its own tokens, and blends them again.
"""


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as an assertion
    """Raise `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_numbers(settings: object, where: str = "") -> None:
    """Check every number of a dataclass of settings, and of those inside it.

    Args:
        settings: the dataclass; every run is checked when it is made.
        where: dotted name of this object in messages; empty for the outermost.

    Raises:
        ValueError: a number is infinite, NaN or beyond 64 bits, which no record could keep.
    """
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        name, value = f"{where}{item.name}", getattr(settings, item.name)
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            too_large = isinstance(number, int) and abs(number) >= 2**63
            if too_large or (isinstance(number, float) and not math.isfinite(number)):
                raise ValueError(f"{name} ({value}) must be a finite number of at most 64 bits")


def check_max_pixels(max_pixels: int) -> None:
    """Check a limit on the pixels of a picture, wherever one is given.

    Raises:
        ValueError: below 1, or more than twice the default: a few pictures would fill the memory.
    """
    _require(
        1 <= max_pixels <= 2 * MAX_PIXELS,
        f"max_pixels ({max_pixels}) must be between 1 and {2 * MAX_PIXELS}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Architecture of a tokenizer: encoder, quantizer, source predictor and decoder."""

    image_size: int = 64
    """Side of the square training images, in pixels."""
    stem: Literal["cnn", "patch"] = "cnn"
    """How pixels become grid tokens: residual CNN (versions G, G+R) or one patch layer (R)."""
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`; every level but one halves the side."""
    num_res_blocks: int = 4
    """Residual blocks per CNN level; the decoder has one more on every level but the finest."""
    patch_dim: int = 768
    """Encoder transformer width when `stem` is patch; with a CNN it is the last level's width."""
    num_layers: int = 12
    """Merging transformer blocks in the encoder."""
    num_heads: int = 8
    """Attention heads in the encoder."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid; a patch stem needs them."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    transformer_norm_eps: float = 1e-6
    """Added to the variance in the layer norms of the encoder's and the decoder's blocks; the
    authors' code has 1e-5."""
    patch_norm_eps: float = 1e-5
    """Added to the variance in the norm of a patch stem; the authors' code has 1e-6."""
    merge_shape: MergeShape = "linear"
    """How merging is spread over blocks: `linear` is the authors' code, `square` the paper's."""
    num_kept: int = 144
    """Nominal K: tokens kept per image when a call does not say."""
    kept_range: tuple[int, int] | None = None
    """Smallest and largest K trained on, written by training; a K outside it warns."""
    num_bits: int = 18
    """D: bits of a token; the codebook has 2**D entries and is never stored."""
    num_decoder_layers: int = 12
    """Transformer blocks in the decoder."""
    num_decoder_heads: int = 8
    """Attention heads in the decoder."""
    source_dim: int = 384
    """Width of the source predictor (paper, Table A2)."""
    num_source_layers: int = 2
    """Blocks of the source predictor."""
    num_source_heads: int = 8
    """Attention heads of the source predictor."""

    def __post_init__(self) -> None:
        """Reject what cannot be built, naming both numbers."""
        _require(
            min(self.channel_mult, default=0) >= 1,
            f"channel_mult {self.channel_mult} must name one positive multiple per CNN level",
        )
        for name in ("channels", "num_res_blocks", "num_layers", "num_source_layers"):
            _require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        _require(
            self.image_size > 0 and self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be a positive multiple of the patch size "
            f"({self.patch_size}), which is 2 to the number of levels in channel_mult minus one",
        )
        _require(
            1 <= self.num_kept <= self.num_tokens,
            f"num_kept ({self.num_kept}) must be between 1 and the {self.num_tokens} tokens of a "
            f"{self.image_size}-pixel image with patch size {self.patch_size}",
        )
        least = -(-self.num_tokens >> self.num_layers)  # rounded up
        _require(
            self.num_kept >= least,
            f"num_kept ({self.num_kept}) must be at least {least}: each of num_layers "
            f"({self.num_layers}) can merge half of its tokens and the first has {self.num_tokens}",
        )
        for name in ("transformer_norm_eps", "patch_norm_eps"):
            eps = getattr(self, name)
            _require(0 < eps < 1, f"{name} ({eps}) must be above 0 and below 1")
        low, high = self.kept_range or (1, 1)
        _require(
            1 <= low <= high, f"kept_range {self.kept_range} must be a smallest and a largest K"
        )
        _require(1 <= self.num_bits <= 63, f"num_bits ({self.num_bits}) must be between 1 and 63")
        widths = (
            ("encoder width", self.dim, "num_heads", self.num_heads),
            ("decoder width", self.decoder_dim, "num_decoder_heads", self.num_decoder_heads),
            ("source_dim", self.source_dim, "num_source_heads", self.num_source_heads),
        )
        for width_name, width, heads_name, heads in widths:
            _require(
                heads > 0 and width % heads == 0,
                f"{width_name} ({width}) must be a multiple of {heads_name} ({heads})",
            )
        _require(
            all((self.channels * mult) % self.num_groups == 0 for mult in self.channel_mult),
            f"channels ({self.channels}) times each of channel_mult {self.channel_mult} must be a "
            f"multiple of the {self.num_groups} normalisation groups",
        )
        # Sine and cosine of row and column.
        _require(
            self.source_dim % 4 == 0, f"source_dim ({self.source_dim}) must be a multiple of 4"
        )
        _require(
            not self.position_embedding or self.dim % 4 == 0,
            f"encoder width ({self.dim}) must be a multiple of 4 for position_embedding",
        )
        _require(
            self.stem == "cnn" or self.patch_dim % self.num_groups == 0,
            f"patch_dim ({self.patch_dim}) must be a multiple of {self.num_groups}",
        )

    @property
    def patch_size(self) -> int:
        """Pixels per side of one grid cell: the downsampling factor f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens per side before merging, at the trained size."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L: tokens before merging, at the trained size."""
        return self.grid_size**2

    @property
    def dim(self) -> int:
        """Encoder transformer width."""
        return self.patch_dim if self.stem == "patch" else self.decoder_dim

    @property
    def decoder_dim(self) -> int:
        """Decoder transformer width: the channels of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptConfig:
    """The distribution K is drawn from, one K per optimizer step, the same on every rank.

    Candidate k of n has probability proportional to `exp(-rate * k) + floor` (exponential),
    `exp(-(k - mean)**2 / (2 * std**2)) + floor` (gaussian) or 1 (uniform).
    """

    distribution: Literal["uniform", "exponential", "gaussian"] = "uniform"
    """Family of the distribution over the candidates' positions 0, 1, 2, .."""
    candidates: tuple[int, ...] = (144,)
    """The K that may be drawn; one candidate is a fixed K."""
    rate: float = 2.0
    """Decay of `exponential` per candidate (paper, equation 15)."""
    mean: float = 1.0
    """Centre of `gaussian` as a candidate position (paper, equation 16)."""
    std: float = 0.5
    """Width of `gaussian` in candidate positions."""
    floor: float = 0.0
    """Added to every candidate; the authors' code has 0.05 (gaussian), 0.05 (exponential, with
    rate 2: theirs is 0.1 against an amplitude of 2)."""

    def __post_init__(self) -> None:
        """Reject an empty or impossible distribution."""
        _require(len(self.candidates) > 0, "candidates must name at least one number of tokens")
        _require(
            min(self.candidates) >= 1, f"candidates {self.candidates} must all be at least 1 token"
        )
        _require(self.std > 0, f"std ({self.std}) must be above 0")
        _require(self.floor >= 0, f"floor ({self.floor}) must be at least 0")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """One probability per candidate; they sum to 1."""
        positions = range(len(self.candidates))
        if self.distribution == "uniform":
            weights = [1.0 for _ in positions]
        elif self.distribution == "exponential":
            weights = [math.exp(-self.rate * k) + self.floor for k in positions]
        else:
            weights = [
                math.exp(-((k - self.mean) ** 2) / (2 * self.std**2)) + self.floor
                for k in positions
            ]
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where images come from and how they are prepared."""

    path: str = "digits"
    """A folder of images, a parquet file or a folder of them, WebDataset tar shards
    (`shards-{000..009}.tar` or a folder of .tar), or `digits` (scikit-learn's, 1,797 images)."""
    val_path: str | None = None
    """The same for validation; None holds out `val_fraction` of `path`."""
    val_fraction: float = 0.05
    """Share of `path` held out for validation, chosen by a fixed hash; used without `val_path`."""
    max_images: int | None = None
    """Use at most this many training images, evenly spaced over the data."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height; larger ones count as unreadable."""
    crop: Literal["center", "random"] = "center"
    """After the short side is resized to the image size: which square is kept in training."""
    flip: bool = False
    """Mirror half of the training images."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        """Reject a validation share outside (0, 1), and counts below what is possible."""
        _require(0 < self.val_fraction < 1, f"val_fraction ({self.val_fraction}) must be in (0, 1)")
        check_max_pixels(self.max_pixels)
        _require(self.num_workers >= 0, f"num_workers ({self.num_workers}) must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the tokenizer's losses (paper, Table A1; authors' code where they differ)."""

    reconstruction_weight: float = 1.0
    """L1 between image and reconstruction."""
    perceptual_weight: float = 1.0
    """LPIPS; without weights for its trunk training continues at 0 and says so."""
    perceptual_trunk: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network of the perceptual loss."""
    perceptual_path: str | None = None
    """Local safetensors file or folder with the LPIPS weights; None looks in the cache only."""
    adversarial_weight: float = 0.1
    """Non-saturating generator loss, reached at the end of the ramp."""
    discriminator_channels: int = 64
    """Base width of the patch discriminator."""
    discriminator_start_step: int = 0
    """First step at which the discriminator is trained."""
    adversarial_start_step: int = 1000
    """First step at which the discriminator's verdict enters the tokenizer's loss."""
    adversarial_ramp_steps: int = 1000
    """Steps over which that weight rises linearly to `adversarial_weight`."""
    lecam_weight: float = 0.01
    """LeCam regularisation of the discriminator."""
    commitment_weight: float = 0.25
    """Mean squared distance of latents to their codes."""
    entropy_weight: float = 0.1
    """Token entropy minus codebook entropy."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignment in both entropies."""
    source_weight: float = 0.5
    """Cross-entropy of the source predictor (0.5 for G and G+R, 1.0 for R)."""
    source_gradient: float = 0.0
    """Share of that term's gradient that reaches the codes: 0 leaves them to the pixels, above 0
    teaches them to tell where they lie."""
    recovered_share: float = 0.0
    """Share of a batch decoded with the recovered source, so that training meets its mistakes."""
    alignment_weight: float = 1.0
    """Class token against the teacher (0.1 for G, 1.0 for G+R and R)."""

    def __post_init__(self) -> None:
        """Reject negative weights and an impossible order of the adversarial steps."""
        weights = {name: getattr(self, name) for name in self.__slots__ if name.endswith("_weight")}
        for name, weight in weights.items():
            _require(math.isfinite(weight) and weight >= 0, f"{name} ({weight}) must be at least 0")
        for name in ("source_gradient", "recovered_share"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"{name} ({share}) must be between 0 and 1")
        _require(
            self.entropy_temperature > 0,
            f"entropy_temperature ({self.entropy_temperature}) must be above 0",
        )
        _require(
            self.discriminator_start_step <= self.adversarial_start_step,
            f"discriminator_start_step ({self.discriminator_start_step}) must not be after "
            f"adversarial_start_step ({self.adversarial_start_step}): an untrained discriminator "
            "ruins reconstructions",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """What the class token is aligned with."""

    kind: Literal["none", "labels", "self", "dinov2", "huggingface"] = "self"
    """`dinov2` and `huggingface` are frozen vision models, `self` is an EMA of the encoder,
    `labels` the data's classes."""
    path: str | None = None
    """Local folder, or owner/name@revision on Hugging Face; None is DINOv2 ViT-B for `dinov2`."""
    loss: Literal["kl", "dino", "cosine"] = "kl"
    """Against a frozen model: `kl` at `temperature` over its features (authors' code), `dino` the
    cross-entropy of the paper's equation 10, `cosine` one minus the cosine."""
    temperature: float = 4.0
    """Of `kl`."""
    view_size: int | None = None
    """Side of the augmented view the student sees, in pixels; None is the tokenizer's size."""
    teacher_size: int = 224
    """Side of the view a frozen model sees, in pixels."""
    num_head_layers: Literal[2, 3] = 3
    """Linear layers of the alignment head (2 in G, 3 in G+R and R)."""
    num_prototypes: int = 1024
    """Output dimension of the heads of `self`."""
    momentum: float = 0.996
    """EMA of the `self` teacher per step."""
    student_temperature: float = 0.1
    """Of `self` and `dino`."""
    teacher_temperature: float = 0.04
    """Of `self` and `dino`; sharpens the teacher."""
    label_smoothing: float = 0.1
    """Of `labels`."""

    def __post_init__(self) -> None:
        """Reject a frozen model without a name and temperatures that are not positive."""
        _require(
            self.kind != "huggingface" or self.path is not None,
            "teacher kind 'huggingface' needs path: a local folder, or owner/name@revision",
        )
        for name in ("temperature", "student_temperature", "teacher_temperature"):
            _require(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, clipping and the moving average of the weights."""

    lr: float = 1e-4
    """Peak learning rate at `base_batch_size`; the rate used is scaled linearly to the batch."""
    base_batch_size: int | None = None
    """Batch the rate was chosen for; None uses `lr` as it is at any batch size."""
    betas: tuple[float, float] = (0.5, 0.9)
    """AdamW's moments."""
    weight_decay: float = 0.0
    """On matrices only, never on gains, biases and embeddings."""
    warmup_steps: int = 0
    """Linear rise of the rate from 0."""
    schedule: Literal["constant", "cosine", "step", "linear"] = "constant"
    """After the warm-up; `step` divides by 10 at each of `milestones`."""
    milestones: tuple[float, ...] = (0.85, 0.95)
    """Of `step`, as shares of all steps."""
    final_lr_ratio: float = 0.0
    """Last rate of `cosine` and `linear` as a share of the peak."""
    clip_norm: float | None = 1.0
    """Largest gradient norm of each side; None does not clip."""
    ema_decay: float = 0.999
    """Of the averaged weights that evaluation and the saved model use."""

    def __post_init__(self) -> None:
        """Reject rates that cannot train."""
        _require(self.lr > 0, f"lr ({self.lr}) must be above 0")
        _require(0 <= self.ema_decay < 1, f"ema_decay ({self.ema_decay}) must be in [0, 1)")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm ({self.clip_norm}) must be above 0, or None for no clipping",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop: how long, how large, how precise, what is written and when."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images (or sequences) per optimizer step over all ranks and accumulated parts."""
    accumulation: int = 1
    """Parts each rank's share of the batch is cut into, to save memory."""
    precision: Precision = "auto"
    """`auto` is bf16 where the device has it, else float32; float16 only when asked for."""
    device: Device = "auto"
    """Where to train."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes each hold all weights, moments and averages (`ddp`), or each a part of them
    (`fsdp`, generators only), which needs less memory and a file system that all can reach."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    seed: int = 0
    """Of every random number in the run."""
    log_every: int = 20
    """Steps between log lines."""
    image_every: int = 500
    """Steps between reconstruction grids."""
    eval_every: int = 500
    """Steps between validations."""
    num_eval_images: int = 256
    """Validation images looked at each time."""
    eval_num_kept: tuple[int, ...] = ()
    """K at which validation reports; empty is the nominal K."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    max_nonfinite: int = 20
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    quantize_start_step: int = 0
    """Before this step the decoder sees the latents themselves, not the codes."""
    max_minutes: float | None = None
    """Minutes of steps after which a run saves and stops, for --resume; None is no limit."""
    tensorboard: bool = False
    """Also write TensorBoard events (the `log` extra)."""

    def __post_init__(self) -> None:
        """Reject counts below 1 and a batch that cannot be cut."""
        counts = ("num_steps", "batch_size", "accumulation", "log_every", "image_every")
        counts += ("eval_every", "num_eval_images", "save_every", "keep_last", "max_nonfinite")
        for name in counts:
            _require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        minutes, batch, parts = self.max_minutes, self.batch_size, self.accumulation
        _require(minutes is None or minutes > 0, f"max_minutes ({minutes}) must be above 0")
        message = f"batch_size ({batch}) must be a multiple of accumulation ({parts})"
        _require(batch % parts == 0, message)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRun:
    """One training run of a tokenizer: `mergevq train RECIPE`."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Architecture."""
    kept: KeptConfig = field(default_factory=KeptConfig)
    """Distribution of K."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss weights."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Alignment."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop."""
    init_from: str | None = None
    """Start from this tokenizer's weights (fine-tuning) instead of random ones."""
    init_vit: str | None = None
    """Fill the encoder's blocks from this DINOv2 ViT by weight selection: name or local folder."""
    out: str = "runs/tokenizer"
    """Directory of the run."""

    def __post_init__(self) -> None:
        """Reject a K that the image does not have or the layers do not reach, and sharding."""
        check_numbers(self)
        _require(
            self.train.parallel == "ddp",
            f"train.parallel ({self.train.parallel}) must be ddp: only generators are sharded",
        )
        _require(
            None in (self.init_from, self.init_vit),
            f"init_from ({self.init_from}) would replace init_vit ({self.init_vit}): leave one out",
        )
        for num_kept in (*self.kept.candidates, *self.train.eval_num_kept):
            replace(self.model, num_kept=num_kept)
