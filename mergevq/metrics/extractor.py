"""A fixed network that turns images into features, from a file, under a name that says which.

Shape letters: B batch, H and W pixels, D feature channels, C classes.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Digest of `inception-2015-12-05.pt` (95,607,719 bytes), the TorchScript translation of the
original Inception graph that NVIDIA publishes with StyleGAN2-ADA and that clean-fid and k-diffusion
use."""
MetricKind = Literal[
    "frechet", "frechet_real", "frechet_ratio", "class_score", "kernel", "precision", "recall"
]
_INCEPTION_NAMES: dict[MetricKind, str] = {
    "frechet": "fid",
    "frechet_real": "fid_real",
    "frechet_ratio": "fid_ratio",
    "class_score": "inception_score",
    "kernel": "kid",
    "precision": "precision",
    "recall": "recall",
}


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metric_name(kind: MetricKind, extractor: str, sha256: str) -> str:
    """Name that a metric over an extractor's outputs may have.

    Args:
        kind: `class_score` is the Inception score's formula, `kernel` the kernel distance.
        extractor: the extractor's name.
        sha256: of its file; only Inception's gives `fid`, `inception_score`, `kid`.
    """
    return _INCEPTION_NAMES[kind] if sha256 == INCEPTION_SHA256 else f"{kind}_{extractor}"


class FeatureExtractor:
    """A frozen network from a TorchScript file, called as the public Inception file is.

    The file's `forward(images, return_features)` takes float32 pixels in 0..255 of any size, and
    resizes and normalises them itself: a resize outside would be one more source of differences.
    It gives (B, D) features with True and (B, C) class probabilities with False. Where `forward`
    has an argument `no_output_bias` it is set for probabilities, as the Inception score requires.

    Args:
        path: of the file. TorchScript is code that runs here: use files you trust.
        device: where it runs.

    Raises:
        ValueError: there is no such file, or its `forward` is another one.
        RuntimeError: the file is not TorchScript.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no extractor at {path}; give the path of a TorchScript file")
        self.sha256 = sha256_of(self.path)
        stem = self.path.stem.removesuffix("_features")
        self.name = re.sub(r"\W+", "_", stem).lower()
        """From the file's name, such as mobilenet_v2 for `mobilenet_v2_features.pt`."""
        self.device = torch.device(device)
        self._network = _load_torchscript(self.path, self.device)
        forward: Any = self._network.forward
        arguments = {argument.name for argument in forward.schema.arguments}
        if "return_features" not in arguments:
            raise ValueError(
                f"extractor {path} has forward({', '.join(sorted(arguments - {'self'}))}) and "
                "needs forward(images, return_features)"
            )
        self._without_bias = {"no_output_bias": True} if "no_output_bias" in arguments else {}
        probe = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        self.dim = self.features(probe).shape[1]
        """D: channels of the features."""

    def to(self, device: torch.device) -> None:
        """Go on on another device."""
        if self.device != device:
            self.device = device
            self._network = self._network.to(device)

    def metric_name(self, kind: MetricKind) -> str:
        """Name that a metric over this extractor's outputs may have, `fid` or `frechet_NAME`."""
        return metric_name(kind, self.name, self.sha256)

    def features(
        self, pixels: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b d"]:
        """Features of images as files hold them, or of pixels in 0..255 between bytes."""
        return self._run(pixels, {"return_features": True})

    def probabilities(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Class probabilities of images as files hold them."""
        return self._run(pixels, {"return_features": False, **self._without_bias})

    def _run(
        self,
        pixels: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"],
        options: dict[str, bool],
    ) -> Float[Tensor, "b d"]:
        with torch.inference_mode():
            output = self._network(pixels.to(self.device).float(), **options)
        if not isinstance(output, Tensor) or output.shape[:-1] != pixels.shape[:1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"extractor {self.path} gave {shape} for {len(pixels)} images with {options}, and "
                f"must give ({len(pixels)}, D)"
            )
        return output.float()


def _load_torchscript(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a TorchScript file, without torch's advice to use another format."""
    with warnings.catch_warnings():
        # The extractors that published numbers were made with exist in this format only.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        try:
            return torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise RuntimeError(f"extractor {path} is not a TorchScript file: {error}") from error
