"""MergeVQ: discrete, variable-length image tokens for generation and representation.

The names below are imported when they are first used, so `import mergevq` and `mergevq --help` do
not load torch. Everything else is in the module that its noun names:
`from mergevq.metrics.image import psnr`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergevq.config.generator import (
        GeneratorConfig,
    )
    from mergevq.config.recipes import recipe
    from mergevq.config.tokenizer import TokenizerConfig
    from mergevq.data.images import open_images
    from mergevq.data.layouts import Source
    from mergevq.data.tokens.dataset import open_tokens
    from mergevq.evaluate.reconstruction import evaluate_reconstruction
    from mergevq.generator.generation import generate, load_pair
    from mergevq.generator.seams import Generator
    from mergevq.tokenizer.codec import decode_image, encode_image, reconstruct_image
    from mergevq.tokenizer.tokenizer import Tokenizer
    from mergevq.training.train import train

__all__ = [
    "Generator",
    "GeneratorConfig",
    "Source",
    "Tokenizer",
    "TokenizerConfig",
    "decode_image",
    "encode_image",
    "evaluate_reconstruction",
    "generate",
    "load_pair",
    "open_images",
    "open_tokens",
    "recipe",
    "reconstruct_image",
    "train",
]
_MODULES = {
    "Generator": "generator.seams",
    "GeneratorConfig": "config.generator",
    "Source": "data.layouts",
    "Tokenizer": "tokenizer.tokenizer",
    "TokenizerConfig": "config.tokenizer",
    "decode_image": "tokenizer.codec",
    "encode_image": "tokenizer.codec",
    "evaluate_reconstruction": "evaluate.reconstruction",
    "generate": "generator.generation",
    "load_pair": "generator.generation",
    "open_images": "data.images",
    "open_tokens": "data.tokens.dataset",
    "recipe": "config.recipes",
    "reconstruct_image": "tokenizer.codec",
    "train": "training.train",
}
"""Module of each name above."""


def __getattr__(name: str) -> object:
    """Import a name on its first use.

    Raises:
        AttributeError: the package gives no such name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergevq.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """All names, imported yet or not."""
    return sorted({*globals(), *__all__})
