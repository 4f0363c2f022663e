"""A generator and a smaller one that drafts its tokens.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
section 2 (arXiv:2211.17192).
"""

import copy
from dataclasses import replace
from pathlib import Path

from mergevq.config.generator import GeneratorConfig
from mergevq.generator.autoregressive import Autoregressive
from mergevq.generator.build import AnyGenerator
from mergevq.generator.drafts.decoder import Drafter
from mergevq.generator.drafts.reader import CellByCell


def with_draft(
    generator: AnyGenerator,
    draft: AnyGenerator,
    *,
    names: tuple[str | Path, str | Path] = ("this one", "the other"),
) -> Autoregressive:
    """The same generator, for passes `drafted` with the draft `model`: the other model drafts.

    Samples are those without it, up to rounding.

    Args:
        generator: of order `raster` or `merge`, in evaluation mode.
        draft: one of the same tokens, where the other is; it should be much faster.
        names: of both, for the message.

    Raises:
        ValueError: the sequences of the two differ, or cannot be drafted.
    """
    require_same_sequences(generator.config, draft.config, names=names)
    if not isinstance(generator, Autoregressive) or not isinstance(draft, Autoregressive):
        raise ValueError(f"order '{generator.config.order.kind}' decodes several tokens in a pass")
    if not isinstance(draft.order, CellByCell):
        raise ValueError(
            f"order '{draft.config.order.kind}' has no tokens that can be drafted; orders 'raster' "
            "and 'merge' have"
        )
    twin = copy.copy(generator)
    # No submodule: it is saved by itself.
    twin.drafter = Drafter(draft.network, draft.order)
    return twin


def require_same_sequences(
    config: GeneratorConfig,
    draft: GeneratorConfig,
    *,
    names: tuple[str | Path, str | Path],
) -> None:
    """Check that a generator can draft for another: both have the same sequences.

    Args:
        config: of the generator.
        draft: of the one that drafts.
        names: of both, for the message.

    Raises:
        ValueError: order, grid, K, parts of a token or classes differ.
    """
    compared = {
        "order": (config.order.kind, draft.order.kind),
        "grid": (config.grid_size, draft.grid_size),
        "K": (_kept(config), _kept(draft)),
        # Of heads of the same parts another depth alone is no difference.
        "head": (config.head, replace(draft.head, num_layers=config.head.num_layers)),
        "number of classes": (config.num_classes, draft.num_classes),
    }
    differing = [
        f"{name} ({theirs}, there {own})"
        for name, (own, theirs) in compared.items()
        if own != theirs
    ]
    if differing:
        raise ValueError(
            f"the generator in {names[1]} cannot draft for that in {names[0]}, from which it "
            f"differs in {', '.join(differing)}; train it on the same tokens with the same of these"
        )


def _kept(config: GeneratorConfig) -> tuple[int, ...]:
    """Each K that a sequence may have."""
    return config.kept_candidates or (config.num_kept,)
