"""Every setting of every run, as frozen values that check themselves.

No torch in this file: the command line reads it before anything heavy is loaded. A recipe
(`mergevq.config.recipes`) is a function that returns a run, the command line overrides single
fields, and the result is written as JSON beside whatever it produced.

Rules: a count is `num_*`, `None` means off, a derived quantity is a property and never stored, and
`__post_init__` only validates.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from mergevq.config.base import MAX_PIXELS, Device, Precision, require
from mergevq.config.generator import (
    GeneratorConfig,
    SamplingSettings,
    check_sampling,
    is_drafted_by_model,
)
from mergevq.config.objective import (
    Distillation,
    LossConfig,
    NoDistillation,
    Preserve,
    SelfDistillation,
    Semantic,
    Teacher,
)
from mergevq.config.parts import (
    NUM_KEYS,
    Binary,
    Continuous,
    NoRegularizer,
    PatchStem,
    Perturb,
    PrefixFlow,
    Queries,
    Regularizer,
    Scales,
    weights_of,
)
from mergevq.config.parts.flows import FlowDecoder, Solution, Times, check_solution
from mergevq.config.ranges import check_numbers
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig


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
    reduced_jpeg: bool = True
    """Decode JPEG for training at a half, a quarter or an eighth of its size where three times the
    side that is needed is left: large photographs load 3 to 6 times faster, and the same crop
    differs by a third of a level of 255 in the mean. Validation, evaluation and tokens decode
    whole."""
    cache: Literal["none", "memory", "device"] = "none"
    """Decode training images once, and keep their bytes in memory or on the device, where they are
    cropped and mirrored: the same pixels as without. Not for teachers that see a view of their
    own (`self`, `huggingface`, `torchscript`)."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        """Reject a validation share outside (0, 1), and impossible counts."""
        check_numbers(self)


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
    """Places of the falls of schedule `step`, as shares of all steps."""
    final_lr_ratio: float = 0.0
    """Last rate of `cosine` and `linear` as a share of the peak."""
    clip_norm: float | None = 1.0
    """Largest gradient norm of each side; None does not clip."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that evaluation and the saved model use."""

    def __post_init__(self) -> None:
        """Reject rates that cannot train."""
        check_numbers(self)


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
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    seed: int = 0
    """Seed of every random number in the run."""
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
    max_minutes: float | None = None
    """Minutes that the whole run may take, stops left out; None is no limit. The run ends with its
    time or its steps, whichever is first, and schedules (warm-up, the fall of the rate, the entry
    of the adversary) follow the share that is used. Results written at the end come on top."""
    tensorboard: bool = False
    """Also write TensorBoard events (the `log` extra)."""

    def __post_init__(self) -> None:
        """Reject counts below 1 and a batch that cannot be cut."""
        check_numbers(self)
        batch, parts = self.batch_size, self.accumulation
        message = f"batch_size ({batch}) must be a multiple of accumulation ({parts})"
        require(batch % parts == 0, message)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainConfig(TrainConfig):
    """The loop of a tokenizer."""

    compile: bool = False
    """Compile encoder, decoder, discriminator and losses, one graph for each K: minutes at the
    start, and a working C++ compiler on CPUs."""


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
    regularizer: Regularizer = field(default_factory=NoRegularizer)
    """Change of codes on their way to the expander."""
    teacher: Teacher = field(default_factory=SelfDistillation)
    """Alignment."""
    distillation: Distillation = field(default_factory=NoDistillation)
    """Features of layers against those of a frozen model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    """Loop."""
    init_from: str | None = None
    """Start from this tokenizer's weights (fine-tuning) instead of random ones."""
    init_vit: str | None = None
    """Fill the encoder's blocks from this DINOv2 ViT by weight selection: name or local folder."""
    init_codes: Literal["random", "components"] = "random"
    """First weights: random ones, or those with which codes are the signs of the training images'
    principal components, so that training begins at pictures instead of noise. `components` needs
    `model.stem.kind` patch with `norm` False; a `model.decoder.kind` of patch begins there too."""
    quantize_start_step: int = 0
    """Before this step the decoder sees the latents themselves, not the codes."""
    encoder_lr_ratio: float = 1.0
    """Learning rate of the encoder over that of all else, from 0 to 1. Below 1 keeps the codes of a
    good start while a decoder learns to use them. At 0 encoder and codes stay as they are: only
    decoder and expander are trained, and tokens and generators of before remain valid."""
    out: str = "runs/tokenizer"
    """Directory of the run."""

    def __post_init__(self) -> None:
        """Reject a K that the image does not have or the layers do not reach."""
        check_numbers(self)
        require(
            None in (self.init_from, self.init_vit),
            f"init_from ({self.init_from}) would replace init_vit ({self.init_vit}): leave one out",
        )
        require(
            self.data.cache == "none" or not self.teacher.views,
            f"data.cache ({self.data.cache}) must be none with teacher.kind ({self.teacher.kind}), "
            "which sees a view of the whole picture; or set teacher.kind to labels or none",
        )
        if isinstance(self.model.quantizer, Continuous):
            self._check_continuous()
        require(
            self.quantize_start_step == 0 or not isinstance(self.model.quantizer, Scales),
            f"quantize_start_step ({self.quantize_start_step}) must be 0 with "
            "model.quantizer.kind scales: latents are of cells, and the decoder's tokens of scales",
        )
        if self.init_codes == "components":
            self._check_components()
        if self.regularizer.drops:
            self._check_drops()
        self._check_distillation()
        for num_kept in (*self.kept.candidates, *self.train.eval_num_kept):
            replace(self.model, num_kept=num_kept)

    @property
    def own_weights(self) -> dict[str, float]:
        """Weights of the terms of the loss that only some kinds of parts have, by name."""
        parts = (self.model.quantizer, self.model.reducer, self.distillation)
        return {name: weight for part in parts for name, weight in weights_of(part).items()}

    def _check_distillation(self) -> None:
        """Reject a block that the decoder does not have, and a start that is not worth keeping."""
        wanted, num_blocks = self.distillation, self.model.decoder.num_blocks
        if isinstance(wanted, Semantic):
            require(
                wanted.layer <= num_blocks,
                f"distillation.layer ({wanted.layer}) must be at most the {num_blocks} blocks of "
                f"model.decoder.kind {self.model.decoder.kind}",
            )
        if isinstance(wanted, Preserve):
            require(
                self.init_from is not None or self.init_vit is not None,
                "distillation.kind (preserve) holds the encoder near its start, which is random "
                "without init_from and init_vit: set one of them, or distillation.kind to none",
            )
            require(
                self.encoder_lr_ratio > 0,
                f"distillation.kind (preserve) needs encoder_lr_ratio "
                f"({self.encoder_lr_ratio:g}) above 0: an encoder without a rate stays as it is",
            )

    def _check_continuous(self) -> None:
        """Reject what is about tokens with indices, where they are real numbers."""
        kind = self.model.quantizer.kind
        require(
            self.quantize_start_step == 0,
            f"quantize_start_step ({self.quantize_start_step}) must be 0 with "
            f"model.quantizer.kind {kind}: nothing is quantized later",
        )
        require(
            not isinstance(self.regularizer, Perturb),
            f"regularizer.kind ({self.regularizer.kind}) must be another one with "
            f"model.quantizer.kind {kind}: real numbers have no near tokens",
        )

    def _check_drops(self) -> None:
        """Reject dropping of tokens of which the first ones are no tokens of the image."""
        kind, reducer = self.regularizer.kind, self.model.reducer
        if not isinstance(reducer, Queries):
            raise ValueError(
                f"regularizer.kind ({kind}) drops the last tokens, and those that "
                f"model.reducer.kind ({reducer.kind}) leaves are the end of the picture: set "
                "model.reducer.kind to queries"
            )
        require(
            reducer.nested or reducer.causal,
            f"regularizer.kind ({kind}) needs model.reducer.nested or model.reducer.causal True: "
            "otherwise fewer tokens are others than the first of more, which are trained",
        )

    def _check_components(self) -> None:
        """Reject an architecture whose weights cannot be set to analytic codes."""
        for name in ("init_from", "init_vit"):
            require(
                getattr(self, name) is None,
                f"init_codes (components) must be random with {name} ({getattr(self, name)}), "
                "which gives the first weights itself",
            )
        model, way_out = self.model, "or set init_codes to random"
        require(
            not model.branches.taps,
            f"init_codes (components) needs model.branches.kind one, not {model.branches.kind}; "
            f"change it, {way_out}",
        )
        stem = model.stem
        if not isinstance(stem, PatchStem) or stem.norm:
            raise ValueError(
                "init_codes (components) needs model.stem.kind patch with model.stem.norm False, "
                f"not {stem.kind}{' with norm True' * getattr(stem, 'norm', False)}; change it, "
                f"{way_out}"
            )
        reducer = model.reducer
        require(
            reducer.ends_with_tokens,
            "init_codes (components) needs model.reducer.kind merge, or pool, global_map or "
            "divprune with fewer model.reducer.num_grid_layers than the "
            f"{reducer.num_layers} blocks, not {reducer.kind} whose last block sees all cells; "
            f"change it, {way_out}",
        )
        require(
            isinstance(model.quantizer, Binary),
            f"init_codes (components) needs codes of bits, not model.quantizer.kind "
            f"{model.quantizer.kind}; change it, {way_out}",
        )
        width, heads, per_group = model.dim, model.reducer.num_heads, model.dim // stem.num_groups
        require(
            per_group % 2 == 0,
            f"init_codes (components) needs an even number of channels in each of the "
            f"{stem.num_groups} normalisation groups, not {per_group}; change model.stem.width "
            f"({width}) or model.stem.num_groups, {way_out}",
        )
        require(
            width // heads > NUM_KEYS,
            f"init_codes (components) needs more than {NUM_KEYS} channels in a head, not "
            f"{width // heads}; lower model.reducer.num_heads ({heads}) or widen model.stem.width "
            f"({width}), {way_out}",
        )
        require(
            model.num_carried >= NUM_KEYS,
            f"init_codes (components) needs channels for {NUM_KEYS} components, and beside "
            f"{model.quantizer.dim} bits and {stem.num_positions} positions, each a pair, there "
            f"are those of {max(0, model.num_carried)}; widen model.stem.width ({width}), "
            f"{way_out}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensConfig:
    """Data of a generator: files of tokens, and the tokenizer that made them."""

    path: str = "runs/tokens"
    """Folder that `mergevq encode` wrote, with tokens for every K of `kept`."""
    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokens' own tokenizer, its name in `mergevq models`, or owner/name@revision
    on Hugging Face."""
    val_fraction: float = 0.05
    """Share of the images held out for validation, mirror images with them; always the same."""

    def __post_init__(self) -> None:
        """Reject a validation share outside (0, 1)."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorRun:
    """One training run of a generator: `mergevq train RECIPE`.

    The candidates of `kept` are those of the model; the classes come from the tokens.
    """

    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Architecture and order; its `kept_candidates` and, at 0, its `num_classes` are filled in."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    """Tokens and their tokenizer."""
    kept: KeptConfig = field(default_factory=KeptConfig)
    """Distribution of K; order `raster` has all cells, one candidate."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop. `image_every` is of sampled pictures."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """Settings of the pictures made while training; without classes they are not guided."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes each hold all weights, moments and averages (`ddp`), or each a part of them
    (`fsdp`), which needs less memory and a file system that all can reach."""
    init_from: str | None = None
    """Start from this generator's weights; with another number of classes, from all but those of
    the classes."""
    out: str = "runs/generator"
    """Directory of the run."""

    def __post_init__(self) -> None:
        """Reject a K that the grid does not have, and shards in float16."""
        check_numbers(self)
        num_tokens = self.model.num_tokens
        require(
            self.model.order.merges or self.kept.candidates == (num_tokens,),
            f"kept.candidates {self.kept.candidates} must be the {num_tokens} cells of the grid in "
            f"order '{self.model.order.kind}'",
        )
        require(
            (self.parallel, self.train.precision) != ("fsdp", "float16"),
            "train.precision (float16) must be bf16 or float32 with parallel fsdp",
        )
        for num_kept in self.train.eval_num_kept:
            require(
                num_kept in self.kept.candidates,
                f"eval_num_kept ({num_kept}) must be one of kept.candidates "
                f"{self.kept.candidates}: there are no tokens of another K",
            )
        check_sampling(self.model, self.sampling)
        require(
            not is_drafted_by_model(self.sampling),
            "sampling.passes.draft (model) must be another one in training, which has no second "
            "generator",
        )
        self.resolved_model  # noqa: B018 - checks that the nominal K is a candidate

    @property
    def resolved_model(self) -> GeneratorConfig:
        """The architecture with the K of this run; `raster` may do without the instruction."""
        without = not (self.model.order.merges or self.model.kept_candidates)
        candidates = () if without else tuple(sorted(set(self.kept.candidates)))
        return replace(self.model, kept_candidates=candidates)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderRun:
    """One training run of a decoder for a tokenizer that stays as it is: `mergevq train RECIPE`."""

    decoder: FlowDecoder = field(default_factory=PrefixFlow)
    """Architecture."""
    times: Times = field(default_factory=Times)
    """Noise levels."""
    solution: Solution = field(default_factory=Solution)
    """How the decoder decodes, in validation and after."""
    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer, its name in `mergevq models`, or owner/name@revision on Hugging
    Face."""
    num_kept: tuple[int, ...] = ()
    """Each K to train on, drawn evenly; empty is the tokenizer's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop."""
    out: str = "runs/decoder"
    """Directory of the run."""

    def __post_init__(self) -> None:
        """Reject a way to decode that the decoder does not have."""
        check_numbers(self)
        check_solution(self.decoder, self.solution)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRun:
    """One run of `mergevq finetune-source`: all that its result depends on."""

    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer, its name in `mergevq models`, or owner/name@revision on Hugging
    Face."""
    tokens: str = "runs/tokens"
    """Folder of its tokens, with their source maps."""
    generator: str = "runs/generator/model"
    """Directory of the generator of order `random` whose mistakes are made, or its id."""
    out: str = "runs/source"
    """Directory of the tokenizer with the new predictor."""
    num_kept: tuple[int, ...] = ()
    """Each K to train on; empty is all that tokens and generator have."""
    max_replaced: float = 0.5
    """Largest share of an image's tokens that the generator makes anew; each step has a share of
    its own, evenly distributed from 0. Below 1: where all tokens are new, the image's own source
    map is no longer theirs."""
    num_passes: int = 8
    """Forward passes of the generator in which the tokens are made."""
    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 256
    """Images per step."""
    num_eval_images: int = 256
    """Held-out images looked at before and after."""
    val_fraction: float = 0.05
    """Share of the images held out, the same ones as in training a generator with this share."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            betas=(0.9, 0.95),
            weight_decay=1e-2,
            schedule="step",
            clip_norm=None,
        )
    )
    """Optimizer; the predictor that is saved has the averaged weights."""
    precision: Precision = "auto"
    """Precision of the predictor's products; the generator samples in float32."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every random number."""

    def __post_init__(self) -> None:
        """Reject shares that leave nothing to recover from, and counts below 1."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PostTraining:
    """One run of `mergevq finetune-decoder`: all that its result depends on."""

    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer, its name in `mergevq models`, or owner/name@revision on Hugging
    Face."""
    generator: str = "runs/generator/model"
    """Directory of the generator of order `random` whose tokens are mixed in, or its id."""
    out: str = "runs/posttrained"
    """Directory of the tokenizer with the new decoder."""
    num_kept: tuple[int, ...] = ()
    """Each K to train on; empty is all that the generator has."""
    preserve: float = 0.7
    """Share of an image's own tokens that stay; the generator makes the others, given these."""
    num_passes: int = 8
    """Forward passes of the generator in which the others are made."""
    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    num_eval_images: int = 256
    """Held-out images looked at before and after."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS beside the mean absolute difference."""
    perceptual_path: str | None = None
    """File or folder with the LPIPS weights; without them LPIPS is left out."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images: those that the tokenizer was trained on."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    """Optimizer; the decoder that is saved has the averaged weights."""
    device: Device = "auto"
    """Where to compute, in float32."""
    seed: int = 0
    """Seed of every random number."""

    def __post_init__(self) -> None:
        """Reject impossible shares and counts."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How a tokenizer of real numbers is made into one with indices."""

    model: str = "runs/tokenizer/model"
    """Its directory, or what else `artefacts.resolve` takes."""
    data: str = "digits"
    """Images that statistics are taken of; see `DataConfig.path`."""
    out: str = "runs/quantized"
    """Directory of the new tokenizer."""
    num_levels: int = 64
    """B: levels of each channel."""
    max_images: int | None = None
    """At most so many images, evenly spaced; None is all."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is read, as width times height."""
    batch_size: int = 64
    """Images encoded at once."""
    device: Device = "auto"
    """Where to encode."""
    num_workers: int = 2
    """Loading processes; 0 loads in this one."""

    def __post_init__(self) -> None:
        """Reject impossible numbers."""
        check_numbers(self)
