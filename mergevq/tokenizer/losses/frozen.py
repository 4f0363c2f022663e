"""Frozen vision models as teachers: from Hugging Face, or an extractor from a TorchScript file.

Source: Li et al. 2025, "MergeVQ", section 3 and equation 10 (arXiv:2504.00999).

Shape letters: B batch, F features, H and W pixels or patches.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from mergevq.metrics.extractor import FeatureExtractor
from mergevq.runtime.artefacts import HUB_FORM, hub_id
from mergevq.runtime.environment import needing
from mergevq.runtime.files import broken_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means, of values in [0, 1], for a model that comes without a preprocessor file."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their deviations."""


class HuggingFaceTeacher:
    """A frozen vision model from Hugging Face.

    No `nn.Module` on purpose: a module that holds it does not register it. It follows the images to
    their device, and computes in float32, or in bfloat16 under a bfloat16 autocast.

    Args:
        path: a folder in the Hugging Face layout, which is read without touching the network, or
            a model on the hub as `owner/name@revision`.

    Raises:
        ValueError: neither a folder nor a model on the hub.
        RuntimeError: `transformers` is missing, or the model cannot be loaded or used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.model, self.has_pooler = _load_vision_model(path)
        self.image_mean, self.image_std = _normalisation(path)
        config = self.model.config
        widths = getattr(config, "hidden_sizes", None)
        width = widths[-1] if widths else getattr(config, "hidden_size", None)
        if width is None:
            raise RuntimeError(f"teacher {path!r} does not say how wide its features are")
        self.out_dim: int = width

    @torch.no_grad()
    def features(self, view: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """Pooled features, or those of the class token where the model does not pool.

        Args:
            view: values in [-1, 1]; normalised here as the model expects.

        Raises:
            ValueError: the view cannot be cut into the model's patches.
        """
        output = self._output(view)
        if self.has_pooler and output.get("pooler_output") is not None:
            return output["pooler_output"].flatten(1).float()
        return output["last_hidden_state"][:, 0].float()

    @torch.no_grad()
    def patches(self, view: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f gh gw"]:
        """Features of each patch after the model's last norm, of convolutions those of each cell.

        Args:
            view: as `features` takes it.

        Raises:
            ValueError: the view cannot be cut into the model's patches.
            RuntimeError: the model has no features of patches.
        """
        states = self._output(view)["last_hidden_state"].float()
        if states.ndim == 4:
            return states
        patch_size = self.patch_size or max(view.shape)
        rows, columns = (side // patch_size for side in view.shape[-2:])
        # Class token and registers are in front.
        if not 0 < rows * columns <= states.shape[1]:
            raise RuntimeError(
                f"teacher {self.path!r} gives {states.shape[1]} tokens and must give one for each "
                f"of {rows * columns} patches; choose a model that keeps all of them, as DINOv2"
            )
        return states[:, -rows * columns :].mT.unflatten(2, (rows, columns))

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels; None where the model has none."""
        size = getattr(self.model.config, "patch_size", None)
        return size if isinstance(size, int) else None

    def _output(self, view: Float[Tensor, "b 3 h w"]) -> Any:  # noqa: ANN401 - of transformers
        """Output of the model for a view in [-1, 1].

        Raises:
            ValueError: the view cannot be cut into the model's patches.
        """
        patch_size, (height, width) = self.patch_size, view.shape[-2:]
        if patch_size is not None and (height % patch_size or width % patch_size):
            raise ValueError(
                f"teacher_size ({height} x {width}) must be a multiple of the patch size "
                f"({patch_size}) of teacher {self.path!r}"
            )
        kind = view.device.type
        in_bf16 = (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        )
        mean = view.new_tensor(self.image_mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = view.new_tensor(self.image_std, dtype=torch.float32).view(1, 3, 1, 1)
        pixels = ((view.float() + 1) / 2 - mean) / std
        if self.model.device != view.device:
            self.model.to(view.device)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=in_bf16):
            return self.model(pixel_values=pixels)


class TorchScriptTeacher:
    """A frozen feature extractor from a TorchScript file; see `FeatureExtractor` for its calls.

    No `nn.Module` on purpose: a module that holds it does not register it. It follows the images to
    their device, and computes in float32 under any autocast.

    Args:
        path: of the file. TorchScript is code that runs here: use files you trust.

    Raises:
        ValueError: there is no such file, or its `forward` is another one.
        RuntimeError: the file is not TorchScript.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.extractor = FeatureExtractor(path)
        self.out_dim: int = self.extractor.dim

    def features(self, view: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """Features of a view.

        Args:
            view: values in [-1, 1].

        Raises:
            ValueError: the features are of another shape.
        """
        self.extractor.to(view.device)
        with torch.autocast(view.device.type, enabled=False):
            features = self.extractor.features((view.float() + 1) * 127.5)
        # A copy: what was made in inference mode cannot take part in a loss.
        return features.clone()


FrozenModel = HuggingFaceTeacher | TorchScriptTeacher


def _load_vision_model(path: str) -> tuple[Any, bool]:
    """A frozen float32 model, and whether its pooled output was trained.

    Code that a model brings along is never run.

    Raises:
        ValueError: neither a folder nor a model on the hub.
        RuntimeError: `transformers` or the model is missing, or weights are or are broken.
    """
    name, where = _located(path)
    purpose = "a frozen teacher (unlike teacher kind 'self', 'labels', 'torchscript' or 'none')"
    with needing("teacher", purpose):
        from transformers import AutoModel
    try:
        model, report = AutoModel.from_pretrained(
            name,
            **where,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(
            f"teacher {path!r} could not be loaded ({error}); give the folder of a downloaded "
            "model, with its config.json and model.safetensors"
        ) from error
    # Some checkpoints come without the pooler their class has; it would be left at random.
    untrained_pooler = [name for name in report["missing_keys"] if "pooler" in name]
    missing = sorted(set(report["missing_keys"]) - set(untrained_pooler))
    if missing:
        raise RuntimeError(f"teacher {path!r} lacks the weights {', '.join(missing)}")
    if problem := broken_weights(model.state_dict()):
        raise RuntimeError(f"the weights of teacher {path!r} are broken: {problem}")
    # Models of image and text, such as CLIP, hold their image half under this name.
    model = getattr(model, "vision_model", model)
    return model.float().requires_grad_(requires_grad=False).eval(), not untrained_pooler


def _located(path: str) -> tuple[str, dict[str, Any]]:
    """A model for `from_pretrained`: its name, and where that is looked up.

    Raises:
        ValueError: neither a folder nor a model on the hub.
    """
    if Path(path).is_dir():
        return path, {"local_files_only": True}
    known = hub_id(path)
    if known is None:
        raise ValueError(
            f"teacher {path!r} is no folder; give the folder of a downloaded model, or {HUB_FORM}"
        )
    return known.name, {"revision": known.revision}


def _normalisation(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and deviations, of values in [0, 1], that a model expects."""
    # Reading the file alone: making the processor from it would need torchvision.
    from transformers.image_processing_base import ImageProcessingMixin

    name, where = _located(path)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **where)
    except OSError:
        settings = {}
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    return tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
