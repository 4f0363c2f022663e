"""Generators built from their settings: the one list of families, orders and heads there are.

Another one is a class in `config/generator.py`, a file, and a case here.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from mergevq.config.generator import GeneratorConfig
from mergevq.config.parts import heads, orders
from mergevq.generator import seams
from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.heads.bits import Bits
from mergevq.generator.heads.independent import Independent
from mergevq.generator.heads.subindices import Subindices
from mergevq.generator.nat import Nat
from mergevq.generator.network import Head, Network
from mergevq.generator.orders.anchored import Anchored
from mergevq.generator.orders.holistic import Holistic
from mergevq.generator.orders.merge import Merge
from mergevq.generator.orders.ordered import Ordered
from mergevq.generator.orders.random import Random
from mergevq.generator.orders.raster import Raster
from mergevq.generator.orders.scale import Scale
from mergevq.generator.orders.stream import Stream
from mergevq.runtime.artefacts import SavedModel, build_for, load_model, resolve, save_model
from mergevq.runtime.settings import from_json

Sequential = (
    orders.Raster
    | orders.Merge
    | orders.Random
    | orders.Anchored
    | orders.Stream
    | orders.Ordered
    | orders.Holistic
    | orders.Scale
)
"""Orders of the autoregressive family."""
AnyGenerator = Autoregressive | Nat
"""Every family of generators, each an `nn.Module` and a `seams.Generator`."""


def build_generator(config: GeneratorConfig) -> AnyGenerator:
    """A generator with random weights from torch's default generator, in training mode."""
    network = Network(config, build_head(config))
    if isinstance(config.order, orders.Masked):
        return Nat(config, config.order, network)
    return Autoregressive(config, build_order(config.order, config), network)


def build_order(  # noqa: PLR0911 - one case for each kind
    order: Sequential, config: GeneratorConfig
) -> seams.Order:
    """The order of an autoregressive generator."""
    match order:
        case orders.Raster():
            return Raster(order, config)
        case orders.Merge():
            return Merge(order)
        case orders.Random():
            return Random(order, config)
        case orders.Anchored():
            return Anchored(config)
        case orders.Stream():
            return Stream(order)
        case orders.Ordered():
            return Ordered()
        case orders.Holistic():
            return Holistic(order, config)
        case orders.Scale():
            return Scale(order, config)
        case _:
            assert_never(order)


def build_head(config: GeneratorConfig) -> Head:
    """The head over the parts of a token."""
    match config.head:
        case heads.Subindices():
            return Subindices(config)
        case heads.Independent():
            return Independent(config)
        case heads.Bits():
            return Bits(config, config.head)
        case _:
            assert_never(config.head)


def with_full_cache(generator: AnyGenerator) -> Autoregressive | None:
    """A generator of order `merge` with the same weights whose cache keeps every token.

    It samples the same tokens, up to rounding, in more memory.

    Returns:
        The generator; None for other orders, whose caches are not compressed.
    """
    if not isinstance(generator, Autoregressive) or not isinstance(generator.order, Merge):
        return None
    twin = copy.copy(generator)
    twin.order = replace(generator.order, compresses=False)
    return twin


def load_generator(path: str | Path, *, revision: str | None = None) -> AnyGenerator:
    """Load from a directory that `save_generator` or training wrote, or from the hub.

    A directory never touches the network; on the hub, a model is `owner/name@revision`. The
    generator comes back in evaluation mode.

    Args:
        path: the directory, the name of a model of the package, or the name on the hub.
        revision: commit, tag or branch of a model on the hub, where the name has none.

    Raises:
        ValueError: the artefact is of another kind or format, or its weights do not fit.
    """
    return saved_generator(load_model(resolve(path, revision), kind="generator"))


def saved_generator(saved: SavedModel) -> AnyGenerator:
    """Build what was read from disk, in evaluation mode.

    Raises:
        ValueError: its weights do not fit.
    """
    config = from_json(GeneratorConfig, saved.record["config"])
    layers = {
        "num_layers": config.num_layers,
        "head.num_layers": config.head.num_layers,
        "the number of parts of a token": len(config.part_names),
    }
    return build_for(lambda: build_generator(config), saved.state, layers=layers).eval()


def save_generator(
    generator: AnyGenerator, path: str | Path, *, tokenizer: str, class_names: Sequence[str] = ()
) -> None:
    """Write `model.safetensors` and `config.json` into a directory.

    Args:
        generator: of any family.
        path: of the directory.
        tokenizer: hash of the tokenizer (`runtime.artefacts.tokens_hash`) whose tokens these are.
        class_names: of the classes, in order.
    """
    extra = {"tokenizer": tokenizer, "class_names": list(class_names)}
    save_model(path, generator.state_dict(), generator.config, kind="generator", extra=extra)
