"""Material of the tests of probes: a tiny tokenizer and folders of images by class."""

import numpy as np
from PIL import Image
from torch import nn

from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

CONFIG = tokenizer_config(
    image_size=16,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_layers=4,
    num_heads=2,
    layer_scale=0.5,
    num_kept=20,
    num_bits=6,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)
"""64 tokens of an image of 16 pixels."""
COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0)}


def tiny_tokenizer():
    """Random weights large enough that every part shows in the output."""
    model = Tokenizer(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def write_colours(folder, count, *, seed=0):
    """Noisy images of 16 pixels in one folder per colour."""
    noise = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = 150 * np.array(colour) + noise.integers(0, 100, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")
    return folder
