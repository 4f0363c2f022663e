"""Range of every number in settings, by the setting's name; no torch.

Upper ends are far beyond sensible values: what lies outside is a slip of the keyboard, or ends in
numbers that float32 cannot hold. What two settings must be to each other is checked where they are.
"""

from dataclasses import dataclass, fields

from mergevq.config.base import MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float | int
    """Least number, in whole numbers exact."""
    high: float | int
    """Largest number."""
    above: bool = False
    """Whether `low` itself is left out."""
    below: bool = False
    """Whether `high` itself is left out."""

    def __contains__(self, number: float | int) -> bool:
        """Whether a number is in it; NaN is in none."""
        after = self.low < number if self.above else self.low <= number
        return after and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        """The range in words, to follow "must be"."""
        low, high = (_shown(end) for end in (self.low, self.high))
        if not self.above and not self.below:
            return f"between {low} and {high}"
        first = f"above {low}" if self.above else f"at least {low}"
        return f"{first} and {'below' if self.below else 'at most'} {high}"


def _shown(number: float | int) -> str:
    """A number in full where it is a whole one."""
    return str(int(number)) if number == int(number) else f"{number:g}"


MAX_GUIDANCE = 1000
"""Largest scale and power of guidance: some hundred times the largest in use."""

_SHARE = Range(0, 1)
_PROPER_SHARE = Range(0, 1, above=True, below=True)
_ALL_BUT_ONE = Range(0, 1, below=True)
_RATE = Range(0, 1000, above=True)  # AdamW moves each weight by about its rate in a step.
_TEMPERATURE = Range(0, 1000, above=True)  # Beyond it a distribution is even, in float32.
_WEIGHT = Range(0, 10**6)
_EPS = _PROPER_SHARE
_STEP = Range(0, 10**9)
_STEPS = Range(1, 10**9)
_IMAGES = Range(1, 2**32)
_BATCH = Range(1, 2**20)
_SIDE = Range(1, 2**16)
_WIDTH = Range(1, 2**20)
_HEADS = Range(1, 2**12)
_LAYERS = Range(1, 2**12)
_TOKENS = Range(1, 2**32)
_INT64 = Range(-(2**63) + 1, 2**63 - 1)

RANGES = {
    # Architecture of a tokenizer
    "image_size": _SIDE,
    "channels": _WIDTH,
    "channel_mult": _WIDTH,
    "num_res_blocks": _LAYERS,
    "patch_size": _SIDE,
    "num_groups": _WIDTH,
    "num_layers": _LAYERS,
    "num_candidates": Range(1, 2**16),
    "cost": Range(0, 1000),
    "cost_weight": _WEIGHT,
    "num_merger_layers": _LAYERS,
    "num_grid_layers": Range(0, 2**12),
    "num_queries": _TOKENS,
    "num_holistic": Range(0, 2**20),
    "num_full_layers": Range(0, 2**12),
    "num_heads": _HEADS,
    "layer_scale": Range(0, 1000),
    "locality": Range(0, 1000),
    "start_noise": Range(0, 1000),
    "exploration": Range(0, 10),  # Cells in two quadrants are 100 apart.
    "align_margin": Range(0, 2),
    "align_weight": _WEIGHT,
    "norm_eps": _EPS,
    "num_kept": _TOKENS,
    "Quality.psnr": Range(0, 200, above=True),
    "Quality.lpips": Range(0, 10, above=True),
    "Quality.bits_per_pixel": Range(0, 1000, above=True),
    "TokenizerConfig.num_kept": _INT64,  # It has a range of its own: the cells of the grid.
    "kept_range": _TOKENS,
    "num_bits": Range(1, 63),
    "GroupedLfq.num_bits": Range(1, 256),
    "group_bits": Range(1, 16),
    "levels": Range(3, 1000),  # Of more, the bound of a channel would round to one level more.
    "codebook_size": Range(2, 2**20),
    "num_codebooks": Range(1, 256),
    "book_dim": _WIDTH,
    "orthogonality_weight": _WEIGHT,
    "kl_weight": _WEIGHT,
    "num_levels": Range(2, 2**16),
    "channel_order": Range(0, 2**20),
    "Unquantized.dim": Range(2, 2**20),  # One channel of mean 0 is 0.
    "branch_dims": _WIDTH,
    "distance_weights": _WEIGHT,
    "depth": _LAYERS,
    "scales": _SIDE,
    "num_filters": _LAYERS,
    "filter_share": _SHARE,
    "EmaUpdate.decay": _ALL_BUT_ONE,
    "restart_below": _SHARE,
    "codebook_weight": _WEIGHT,
    "sample_temperature": _TEMPERATURE,
    "confidence_weight": _WEIGHT,
    "CnnDecoder.num_layers": Range(0, 2**12),
    "width": _WIDTH,
    "bit_components": Range(0, 2**16),
    "semantic_dim": _WIDTH,
    "taps": Range(0, 2**12),
    # Decoders of a flow
    "null_share": _ALL_BUT_ONE,
    "shares": _SHARE,
    "num_token_layers": Range(0, 2**12),
    "num_global_layers": Range(0, 2**12),
    "num_draws": Range(1, 2**12),
    "shift": Range(1, 1000),
    "code_dim": _WIDTH,
    "num_slots": _TOKENS,
    "cell_size": _SIDE,
    "gains": Range(-1000, 1000),
    # Conditions
    "ClassCondition.num_classes": Range(2, 2**20),
    "num_embeddings": Range(1, 2**16),
    "num_bytes": Range(1, 2**32),
    # Regularizers
    "image_share": _SHARE,
    "token_share": _SHARE,
    "num_near": Range(1, 4095),
    "fall": _SHARE,
    "final_ratio": _SHARE,
    # Distribution of K
    "candidates": _TOKENS,
    "KeptConfig.rate": Range(0, 1000),
    "mean": Range(-(10**6), 10**6),
    "std": Range(1e-3, 10**6),
    "floor": _WEIGHT,
    # Data
    "val_fraction": _PROPER_SHARE,
    "max_images": _IMAGES,
    "max_pixels": Range(1, 2 * MAX_PIXELS),  # A few larger ones would fill the memory.
    "num_workers": Range(0, 1024),
    # Losses and teachers
    "reconstruction_weight": _WEIGHT,
    "perceptual_weight": _WEIGHT,
    "adversarial_weight": _WEIGHT,
    "discriminator_channels": _WIDTH,
    "discriminator_start_step": _STEP,
    "adversarial_start_step": _STEP,
    "adversarial_ramp_steps": _STEP,
    "lecam_weight": _WEIGHT,
    "commitment_weight": _WEIGHT,
    "entropy_weight": _WEIGHT,
    "entropy_temperature": _TEMPERATURE,
    "source_weight": _WEIGHT,
    "source_gradient": _SHARE,
    "recovered_share": _SHARE,
    "recovered_start_step": _STEP,
    "alignment_weight": _WEIGHT,
    "Gram.weight": _WEIGHT,
    "Gram.num_taps": Range(1, 7),
    "semantic_weight": _WEIGHT,
    "preserve_weight": _WEIGHT,
    "beta": Range(0, 1000),
    "every": _BATCH,
    "layer": Range(0, 2**12),
    "temperature": _TEMPERATURE,
    "view_size": _SIDE,
    "teacher_size": _SIDE,
    "num_prototypes": _WIDTH,
    "momentum": _SHARE,
    "student_temperature": _TEMPERATURE,
    "teacher_temperature": _TEMPERATURE,
    "label_smoothing": _ALL_BUT_ONE,
    # Optimizer and loop
    "lr": _RATE,
    "base_batch_size": _BATCH,
    "betas": _ALL_BUT_ONE,
    "weight_decay": Range(0, 1000),
    "warmup_steps": _STEP,
    "milestones": _SHARE,
    "final_lr_ratio": _SHARE,
    "clip_norm": Range(0, 10**6, above=True),
    "ema_decay": _ALL_BUT_ONE,
    "encoder_lr_ratio": Range(0, 1),
    "num_steps": _STEPS,
    "batch_size": _BATCH,
    "accumulation": _BATCH,
    "seed": _INT64,
    "log_every": _STEPS,
    "image_every": _STEPS,
    "eval_every": _STEPS,
    "num_eval_images": _IMAGES,
    "eval_num_kept": _TOKENS,
    "save_every": _STEPS,
    "keep_last": Range(1, 10**6),
    "max_nonfinite": _STEPS,
    "quantize_start_step": _STEP,
    "max_minutes": Range(0, 10**7, above=True),
    "max_replaced": _ALL_BUT_ONE,
    "preserve": _SHARE,
    "num_passes": _TOKENS,
    # Architecture of a generator
    "GeneratorConfig.num_kept": _INT64,  # As above.
    "dim": _WIDTH,
    "num_kv_heads": _HEADS,
    "ffn_dim": _WIDTH,
    "visible_weight": _SHARE,
    "num_decoder_layers": _LAYERS,
    "Subindices.sizes": Range(2, 2**63 - 1),
    "Independent.sizes": Range(2, 2**63 - 1),
    "Bits.sizes": Range(2, 2**63 - 1),
    "Bits.schedule": Range(1, 63),
    "Bits.visible_weight": _ALL_BUT_ONE,  # A weight of 1 is that of masked parts.
    "num_classes": Range(0, 2**32),
    "grid_size": _SIDE,
    "kept_candidates": _TOKENS,
    "window": Range(0, 2**32),
    "annealing": _SHARE,
    "dropout": _ALL_BUT_ONE,
    "class_dropout": _ALL_BUT_ONE,
    # Sampling
    "guidance_scale": Range(0, MAX_GUIDANCE),
    "guidance_power": Range(0, MAX_GUIDANCE, above=True),
    "guidance_interval": _SHARE,
    "SamplingSettings.temperature": Range(0, 1000),
    "confidence_temperature": Range(0, 1000),
    "num_drafted": Range(1, 2**16),
    "top_k": Range(0, 2**63 - 1),
    "top_p": Range(1e-6, 1),  # Float32 tells no smaller share of a distribution from none.
    "classifier_outputs": Range(0, 2**31 - 1),
    "SamplingSettings.candidates": Range(1, 2**20),
    "tokens_per_step": _TOKENS,
    "classes": _INT64,  # The generator's; sampling names them.
    "num_images": _IMAGES,
    # Evaluations and probes
    "num_shown": Range(0, 2**16),
    "num_baseline_images": Range(0, 2**32),
    "fractions": _SHARE,
    "map_fractions": _SHARE,
    "radius": Range(0, 256),
    "num_looked_up": Range(1, 2**16),
    "seeds": _INT64,
    "bits": Range(1, 2**40),
    "num_yardstick_images": Range(0, 2**32),
    "stop": Range(0, MAX_GUIDANCE),
    "step": Range(1e-3, MAX_GUIDANCE),  # A smaller one changes no score.
    "layers": Range(0, 2**12),
    "pixel_side": _SIDE,
    "pca_dim": _WIDTH,
    "rates": _RATE,
    "rate": _RATE,
    "held_out_fraction": _PROPER_SHARE,
    "num_epochs": _STEPS,
    "warmup_fraction": _ALL_BUT_ONE,
    "num_crops": Range(0, 10**6),
    "num_neighbours": _IMAGES,
    "layer_decay": Range(0, 1, above=True),
    "mixup": Range(0, 1000),
    "cutmix": Range(0, 1000),
    "randaugment": Range(0, 10),
    "erasing": _SHARE,
    "drop_path": _ALL_BUT_ONE,
}
"""Range by name of a setting, or by class and name where names are shared by two meanings."""


def check_numbers(settings: object) -> None:
    """Check every number of a dataclass of settings; those inside it check their own.

    Raises:
        ValueError: a number is NaN, or outside its range in `RANGES`.
    """
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        check_number(type(settings).__name__, item.name, getattr(settings, item.name))


def check_number(owner: str, name: str, value: object) -> None:
    """Check one setting that may be a number, or several.

    Args:
        owner: name of its class; empty for an argument of a function.
        name: of the setting.
        value: a number, a tuple of numbers, or anything else, which is not looked at.

    Raises:
        ValueError: a number is NaN, or outside its range in `RANGES`.
    """
    allowed = RANGES.get(f"{owner}.{name}") or RANGES.get(name, _INT64)
    several = isinstance(value, tuple)
    for number in value if several else (value,):
        if isinstance(number, int | float) and number not in allowed:
            shown = f"{value} must all be" if several else f"({value}) must be"
            raise ValueError(f"{name} {shown} {allowed}")
