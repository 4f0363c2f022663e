"""MergeVQ: discrete, variable-length image tokens for generation and representation.

The names below are imported when they are first used, so `import mergevq` and `mergevq --help` do
not load torch. Everything else is in the module that its noun names:
`from mergevq.metrics import psnr`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergevq.codec import decode_image, encode_image, reconstruct_image
    from mergevq.config import TokenizerConfig
    from mergevq.config_generator import GeneratorConfig
    from mergevq.evaluate import evaluate_reconstruction
    from mergevq.generation import generate, load_pair
    from mergevq.generator import Generator
    from mergevq.images import open_images
    from mergevq.merge import Source
    from mergevq.recipes import recipe
    from mergevq.tokenizer import Tokenizer
    from mergevq.tokens import open_tokens
    from mergevq.training import train

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
    "Generator": "generator",
    "GeneratorConfig": "config_generator",
    "Source": "merge",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "config",
    "decode_image": "codec",
    "encode_image": "codec",
    "evaluate_reconstruction": "evaluate",
    "generate": "generation",
    "load_pair": "generation",
    "open_images": "images",
    "open_tokens": "tokens",
    "recipe": "recipes",
    "reconstruct_image": "codec",
    "train": "training",
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
