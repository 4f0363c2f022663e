"""Settings of fine-tuning the source predictor; as in `mergevq.config` without torch.

Source: Li et al. 2025, "MergeVQ", table A2 (arXiv:2504.00999), for rate, moments, decay and batch.
"""

from dataclasses import dataclass, field

from mergevq.config import Device, OptimConfig, Precision, check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRun:
    """One run of `mergevq finetune-source`: all that its result depends on."""

    tokenizer: str = "runs/tokenizer/model"
    """Directory of the tokenizer, or owner/name@revision on Hugging Face."""
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
    its own, evenly distributed from 0."""
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
    """Of the predictor's products; the generator samples in float32."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Of every random number."""

    def __post_init__(self) -> None:
        """Reject shares that leave nothing to recover from, and counts below 1."""
        check_numbers(self)
        if not 0 <= self.max_replaced < 1:
            raise ValueError(
                f"max_replaced ({self.max_replaced}) must be at least 0 and below 1: where all "
                "tokens are new, the image's own source map is no longer theirs"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction ({self.val_fraction}) must be in (0, 1)")
        for name in ("num_passes", "num_steps", "batch_size", "num_eval_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
