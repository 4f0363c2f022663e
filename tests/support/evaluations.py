"""Tiny models, networks and images for the tests of evaluations."""

import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mergevq.config.evaluation import Subject
from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Merge,
)
from mergevq.data.images import open_images
from mergevq.evaluate.subject import Opened
from mergevq.generator.build import build_generator, save_generator
from mergevq.metrics.extractor import FeatureExtractor
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

CONFIG = tokenizer_config(
    image_size=16,
    channels=8,
    channel_mult=(1, 1, 1),
    num_res_blocks=1,
    num_layers=2,
    num_heads=2,
    num_kept=8,
    num_bits=4,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_layers=1,
    num_source_heads=2,
)
GENERATOR = GeneratorConfig(
    order=Merge(),
    dim=32,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
    num_classes=3,
    grid_size=(4, 4),
    kept_candidates=(8,),
    num_kept=8,
    head=Subindices(sizes=(4, 4)),
)
ALONE = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Colours(nn.Module):
    """Five features of an image, and the softmax of three of them as classes."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.mean([2, 3])
        spread = images.std([2, 3])[:, :2]
        features = torch.cat([means, spread], 1)
        if return_features:
            return features
        return torch.softmax(means / 16, -1)


def write_network(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(path)
    return path


def write_images(folder, count, size=16, first_seed=0):
    """Smooth random images: noise would be the same to every network."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = np.random.default_rng(first_seed + number).integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:03d}.png")
    return folder


def write_tokenizer(path, config=CONFIG, seed=0):
    """A random tokenizer whose codes and images depend on what goes in."""
    numbers = torch.Generator().manual_seed(seed)
    tokenizer = Tokenizer(config)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.2 + (parameter == 1))
    tokenizer.save_pretrained(path)
    return path


def write_generator(path, tokenizer, seed=0):
    """A random generator of a tokenizer's tokens, of three classes."""
    numbers = torch.Generator().manual_seed(seed)
    generator = build_generator(GENERATOR)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.3)
    save_generator(generator, path, tokenizer=tokens_hash(tokenizer), class_names=["a", "b", "c"])
    return path


def subject_of(tokenizer, images, network=None, perceptual=None, **changes):
    """A subject as `opened` would give it."""
    settings = {"model": "-", "data": str(images), "device": "cpu", "num_workers": 0}
    return Opened(
        subject=Subject(**settings | changes),
        world=ALONE,
        tokenizer=tokenizer.eval(),
        tokenizer_hash="-",
        images=open_images(str(images)),
        perceptual=perceptual,
        extractor=None if network is None else FeatureExtractor(network),
        precision=None,
    )
