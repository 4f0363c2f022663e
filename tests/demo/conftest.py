"""A random tokenizer, generators of its tokens and a few pictures, for the tests of the page."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Masked,
    Merge,
    Random,
)
from mergevq.generator.build import build_generator, save_generator
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.compressed import PictureCodec
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import CONFIG

SMALL = replace(CONFIG, num_kept=6)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random tokenizer, generators of its tokens and eight pictures of two classes."""
    directory = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    Tokenizer(SMALL).eval().save_pretrained(directory / "tokenizer")
    for order in (Merge(), Random(), Masked()):
        generator = build_generator(
            GeneratorConfig(
                order=order,
                dim=32,
                num_layers=1,
                num_heads=2,
                ffn_dim=32,
                num_classes=2,
                grid_size=(4, 4),
                num_kept=6,
                kept_candidates=(6,),
                head=Subindices(sizes=(4, 4)),
            )
        )
        save_generator(
            generator.eval(),
            directory / order.kind,
            tokenizer=tokens_hash(directory / "tokenizer"),
            class_names=["cat", "dog"],
        )
    colours = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    for number, pixels in enumerate(colours):
        place = directory / "pictures" / ("cat" if number < 4 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((16, 16)).save(place / f"{number}.png")
    return directory


@pytest.fixture(scope="session")
def codec(folder):
    return PictureCodec.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer(codec):
    return codec.tokenizer
