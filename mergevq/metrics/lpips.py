"""Perceptual distance between two images: LPIPS, version 0.1, with three trunks.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
section 3 and appendix B (arXiv:1801.03924). Trunks: Simonyan and Zisserman 2015 (arXiv:1409.1556)
for `vgg`, Krizhevsky 2014 (arXiv:1404.5997) for `alex`, Iandola et al. 2016 (arXiv:1602.07360) for
`squeeze`, as laid out in torchvision, whose weights the published heads were fitted to.

The weights are one safetensors file per trunk, `lpips_{trunk}.safetensors`: the trunk under
torchvision's names (`features.*`) and the heads under LPIPS's (`lin{i}.model.1.weight`).

Differs: the authors' code downloads both while it runs. Here nothing is downloaded; whoever has the
two published files joins them once (`convert_perceptual_files`, `mergevq convert --lpips`).

Shape letters: B batch, C channels, H and W pixels or cells.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.runtime.files import broken_weights, read_tensors, write_tensors

TrunkName = Literal["vgg", "alex", "squeeze"]

SHIFT = (-0.030, -0.088, -0.188)
"""Channel means of the trunks' training images, for values in [-1, 1]."""
SCALE = (0.458, 0.448, 0.450)
"""Their deviations."""
NORM_EPS = 1e-10
"""Added to the norm that feature vectors are divided by."""


class Fire(nn.Module):
    """SqueezeNet's block: a narrow 1x1 convolution feeds a 1x1 and a 3x3 one side by side."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        """Make the convolutions; the output has twice `expanded` channels."""
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h w"]:
        """Squeeze, then expand both ways."""
        squeezed = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(squeezed).relu(), self.expand3x3(squeezed).relu()], 1)


def _vgg() -> nn.Sequential:
    """VGG-16 without its last pooling."""
    layers: list[nn.Module] = []
    in_channels = 3
    for channels, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(num_convs):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def _alex() -> nn.Sequential:
    """AlexNet without its last pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _squeeze() -> nn.Sequential:
    """SqueezeNet 1.1."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


class Trunk(NamedTuple):
    """Facts about one network that LPIPS needs."""

    build: Callable[[], nn.Sequential]
    """Makes its convolutional part."""
    taps: tuple[int, ...]
    """Layers whose output is compared."""
    channels: tuple[int, ...]
    """Channels of each tap."""
    min_side: int
    """Smallest image side that leaves every tap a cell, in pixels."""
    torchvision_file: str
    """Where its weights come from; the last part of the name begins the file's SHA-256."""
    digest: str | None
    """`weights_digest` of the published weights, where it was measured."""


TRUNKS: dict[TrunkName, Trunk] = {
    "vgg": Trunk(
        build=_vgg,
        taps=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        min_side=16,
        torchvision_file="vgg16-397923af.pth",
        digest=None,
    ),
    "alex": Trunk(
        build=_alex,
        taps=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        min_side=31,
        torchvision_file="alexnet-owt-7be5be79.pth",
        digest="007c110a0dcbff8843dfa68963415f6d8deed560e66a3ea549470afea73d7f3f",
    ),
    "squeeze": Trunk(
        build=_squeeze,
        taps=(1, 4, 7, 9, 10, 11, 12),
        channels=(64, 128, 256, 384, 384, 512, 512),
        min_side=17,
        torchvision_file="squeezenet1_1-b8a52dc0.pth",
        digest="5341484a08ccdab6c09ccc19de5dd56a687427f529d0993acbb651c8da48e89b",
    ),
}


class Perceptual(nn.Module):
    """LPIPS: the weighted distance between the unit-length features of two images.

    Frozen, and in float32 whatever the autocast. It belongs to no model: keep it beside what is
    trained, never inside, so that no checkpoint holds it.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: TrunkName) -> None:
        """Make the network with random weights; `load_perceptual` gives the published ones."""
        super().__init__()
        self.trunk: TrunkName = trunk
        self.features = TRUNKS[trunk].build()
        for i, channels in enumerate(TRUNKS[trunk].channels):
            # LPIPS's file numbers the head 1, after a dropout that acts in no use of it here.
            conv = nn.Conv2d(channels, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), conv)}))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(
        self, image: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        """Distance of each pair, in float32: 0 for equal images, symmetric.

        Gradients reach whichever image asks for one; for the other nothing is kept in memory.

        Args:
            image: values in [-1, 1].
            reconstruction: values in [-1, 1].

        Raises:
            ValueError: the images are too small for the trunk.
        """
        return self.between(self.taps(image), self.taps(reconstruction))

    def taps(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Features at each tap, every cell's vector scaled to length 1: one side of a comparison.

        Args:
            image: values in [-1, 1].

        Raises:
            ValueError: the image is too small for the trunk.
        """
        features = self.activations(image, len(TRUNKS[self.trunk].taps))
        with torch.autocast(image.device.type, enabled=False):
            # In place of the activations, which need not be kept.
            for i, x in enumerate(features):
                norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
                features[i] = x / (norm + NORM_EPS)
        return features

    def activations(
        self, image: Float[Tensor, "b 3 h w"], num_taps: int
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """Features at the first taps as the trunk gives them, in float32 under any autocast.

        Args:
            image: values in [-1, 1].
            num_taps: as many taps.

        Raises:
            ValueError: the trunk has fewer taps, or the image is too small for it.
        """
        taps = TRUNKS[self.trunk].taps
        if num_taps > len(taps):
            raise ValueError(
                f"num_taps ({num_taps}) must be at most the {len(taps)} of the perceptual trunk "
                f"{self.trunk!r}"
            )
        side, min_side = min(image.shape[-2:]), TRUNKS[self.trunk].min_side
        if side < min_side:
            raise ValueError(
                f"image side ({side}) must be at least {min_side} for the perceptual trunk "
                f"{self.trunk!r}; choose another trunk or a larger image"
            )
        features = []
        with torch.autocast(image.device.type, enabled=False):
            x = (image.float() - self.shift) / self.scale
            for i, layer in enumerate(self.features):
                x = layer(x)
                if i in taps:
                    features.append(x)
                if len(features) == num_taps:
                    break
        return features

    def between(
        self, first: Sequence[Float[Tensor, "b _ _ _"]], second: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, " b"]:
        """Distance of each pair from the features of both sides; see `taps` and `forward`."""
        distance = torch.zeros(len(first[0]), device=first[0].device)
        with torch.autocast(distance.device.type, enabled=False):
            for i, (left, right) in enumerate(zip(first, second, strict=True)):
                head = self.get_submodule(f"lin{i}.model")
                distance = distance + head((left - right).square()).mean((1, 2, 3))
        return distance


def load_perceptual(
    trunk: TrunkName, path: str | None, *, cache: Path | None = None
) -> Perceptual | None:
    """Load LPIPS from a local file; nothing is ever downloaded.

    Args:
        trunk: network to compare with.
        path: a safetensors file or a folder with `lpips_{trunk}.safetensors`; None looks in
            `cache` only.
        cache: folder to look in without `path`; None is `cache_folder()`.

    Returns:
        The frozen network on the CPU, or None when `path` is None and the cache has no file;
        `missing_weights` says what to do then.

    Raises:
        ValueError: `path` is given and leads to no safetensors file.
        RuntimeError: the file holds something else than this trunk and its heads, all finite.
    """
    name = f"lpips_{trunk}.safetensors"
    file = (cache or cache_folder()) / name if path is None else Path(path).expanduser()
    if file.is_dir():
        file = file / name
    if not file.is_file():
        if path is None:
            return None
        raise ValueError(
            f"perceptual_path ({path}) must be a safetensors file or a folder with {name}; "
            + _how_to_get(trunk)
        )
    try:
        state = read_tensors(file)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    perceptual = Perceptual(trunk)
    try:
        perceptual.load_state_dict(state)
    except RuntimeError as error:
        raise RuntimeError(f"{file} does not hold LPIPS with trunk {trunk!r}: {error}") from error
    if problem := broken_weights(state):
        raise RuntimeError(f"the weights in {file} are broken: {problem}; fetch it again")
    published = TRUNKS[trunk].digest
    if published is not None and weights_digest(state) != published:
        warnings.warn(
            f"{file} differs from the published LPIPS 0.1 weights of trunk {trunk!r}: distances "
            "cannot be compared with anyone else's",
            stacklevel=2,
        )
    return perceptual


def cache_folder(override: str | None = None) -> Path:
    """Folder for weights that are looked up without a path.

    Args:
        override: another folder; None or empty is `.cache/mergevq` in the home folder.
    """
    return Path(override).expanduser() if override else Path.home() / ".cache" / "mergevq"


def missing_weights(trunk: TrunkName, *, cache: Path | None = None) -> str:
    """Notice for a run that goes on without perceptual loss because there are no weights."""
    folder = cache or cache_folder()
    return f"no LPIPS weights for trunk {trunk!r} in {folder}; {_how_to_get(trunk)}"


def _how_to_get(trunk: TrunkName) -> str:
    """Say which two published files make `lpips_{trunk}.safetensors`, and how."""
    published = TRUNKS[trunk].torchvision_file
    return (
        f"to make lpips_{trunk}.safetensors, fetch {published} (torchvision's pretrained weights, "
        f"download.pytorch.org/models/{published}) and lpips/weights/v0.1/{trunk}.pth (the LPIPS "
        "project, richzhang/PerceptualSimilarity on GitHub), and join them: mergevq convert "
        f"--lpips {published} {trunk}.pth --out lpips_{trunk}.safetensors"
    )


def convert_perceptual_files(
    trunk_file: Path, heads_file: Path, out: Path, *, read: Callable[[Path], Mapping[str, Tensor]]
) -> Path:
    """Join the two published files into the one that `load_perceptual` reads.

    Which trunk it is, the heads' shapes tell. Weights that are not the published ones are written
    too, with a warning: values are compared where their digest was measured, and else the trunk's
    file with the beginning of its SHA-256, which torchvision puts into its name.

    Args:
        trunk_file: torchvision's network, such as `vgg16-397923af.pth`.
        heads_file: of LPIPS 0.1, such as `vgg.pth`.
        out: file to write, or a folder for `lpips_{trunk}.safetensors`.
        read: gives the state dict in a file. Torch's files may hold code, and `interop`, which can
            read them without running any, is above this module.

    Returns:
        The file written.

    Raises:
        ValueError: the two files are not a trunk and its heads, or hold values that are not finite.
    """
    state = convert_perceptual(read(trunk_file), read(heads_file))
    trunk = _trunk_of(state)
    try:
        Perceptual(trunk).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{trunk_file} does not go with {heads_file}, the heads of trunk {trunk!r}: {error}"
        ) from error
    if problem := broken_weights(state):
        raise ValueError(f"the weights in {trunk_file} or {heads_file} are broken: {problem}")
    published = TRUNKS[trunk]
    if published.digest is None:
        begins = Path(published.torchvision_file).stem.rpartition("-")[2]
        found = hashlib.sha256(trunk_file.read_bytes()).hexdigest()
        is_published = found.startswith(begins)
    else:
        is_published = weights_digest(state) == published.digest
    if not is_published:
        warnings.warn(
            f"{trunk_file} and {heads_file} are not {published.torchvision_file} and the LPIPS 0.1 "
            f"heads of trunk {trunk!r}: distances cannot be compared with anyone else's",
            stacklevel=2,
        )
    file = out / f"lpips_{trunk}.safetensors" if out.is_dir() else out
    file.parent.mkdir(parents=True, exist_ok=True)
    # A file that is half written must not look like weights.
    part = file.with_name(f"{file.name}.part")
    write_tensors(part, state)
    part.replace(file)
    return file


def _trunk_of(state: Mapping[str, Tensor]) -> TrunkName:
    """The trunk whose taps have as many channels as the heads.

    Raises:
        ValueError: no trunk does.
    """
    heads = sorted(name for name in state if name.startswith("lin"))
    channels = tuple(state[name].shape[1] for name in heads if state[name].ndim == 4)
    for trunk, known in TRUNKS.items():
        if known.channels == channels:
            return trunk
    raise ValueError(
        f"heads of {channels} channels must be those of {', '.join(TRUNKS)}: "
        + "; ".join(str(known.channels) for known in TRUNKS.values())
    )


def convert_perceptual(
    trunk_state: Mapping[str, Tensor], heads_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Join the two published state dicts into the one that `Perceptual` loads.

    Args:
        trunk_state: of torchvision's network; its classifier is left out.
        heads_state: of LPIPS 0.1: `lin{i}.model.1.weight`.

    Raises:
        ValueError: one of the two holds nothing of what it should.
    """
    trunk = {name: value for name, value in trunk_state.items() if name.startswith("features.")}
    heads = {name: value for name, value in heads_state.items() if name.startswith("lin")}
    if not trunk or not heads:
        raise ValueError(
            f"trunk_state ({len(trunk)} names in features.*) and heads_state ({len(heads)} names "
            "in lin*) must both hold weights: torchvision's network first, then LPIPS's heads"
        )
    return {name: value.float().contiguous() for name, value in (trunk | heads).items()}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and float32 values, whatever the file's order and dtype."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
