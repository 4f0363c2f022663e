"""Named runs: what `mergevq train RECIPE` trains.

Each is a function that returns a complete run, most of them another one with a few fields changed.
The docstring says on what hardware, for how long, and which number to expect; "measured" numbers
are in docs/results.md with their command, all others are the paper's or the authors' README. Where
nobody has measured, it says how many steps of how many images there are, and no hours.
"""

from collections.abc import Callable

from mergevq.config.base import nearest
from mergevq.config.recipes.conditions import digits32_class
from mergevq.config.recipes.decoders import (
    digits32_group_flow,
    digits32_knot_flow,
    digits32_pixel_flow,
    digits32_prefix_flow,
)
from mergevq.config.recipes.digits import (
    digits32,
    digits32_anchor_bits,
    digits32_ar,
    digits32_bernoulli,
    digits32_bits,
    digits32_bsq,
    digits32_causal,
    digits32_divprune,
    digits32_dual,
    digits32_enat,
    digits32_fsq,
    digits32_global_map,
    digits32_gq32,
    digits32_kl,
    digits32_learned_merge,
    digits32_maskgit,
    digits32_nested,
    digits32_ordered,
    digits32_perturb,
    digits32_pool,
    digits32_posttrain,
    digits32_preserve,
    digits32_product,
    digits32_queries,
    digits32_rar,
    digits32_select,
    digits32_semantic,
    digits32_shared,
    digits32_stream,
    digits32_tail_drop,
    digits32_vq,
)
from mergevq.config.recipes.holistic import digits32_holistic, digits32_holistic_ar
from mergevq.config.recipes.imagenet256 import (
    imagenet256_g,
    imagenet256_g_d32,
    imagenet256_g_d96,
    imagenet256_g_mergear,
    imagenet256_g_randar,
    imagenet256_g_raster,
    imagenet256_g_source,
    imagenet256_gr,
    imagenet256_gr_d32,
    imagenet256_gr_d96,
    imagenet256_gr_mergear,
    imagenet256_gr_randar,
    imagenet256_gr_raster,
    imagenet256_gr_source,
    imagenet256_r,
)
from mergevq.config.recipes.images128 import (
    imagenet128_g,
    imagenet128_gr,
    imagenet128_r,
    images128_gr,
)
from mergevq.config.recipes.photos import (
    photos64,
    photos64_mergear,
    photos64_wide,
    photos64_wide_mergear,
    photos64_wide_randar,
)
from mergevq.config.recipes.scales import digits32_next_scale, digits32_scales
from mergevq.config.recipes.tiny64 import (
    tiny64_anchored,
    tiny64_g,
    tiny64_gr,
    tiny64_mergear,
    tiny64_r,
    tiny64_randar,
    tiny64_raster,
)
from mergevq.config.training import DecoderRun, GeneratorRun, SourceRun, TokenizerRun

GENERATOR_RECIPES: dict[str, Callable[[], GeneratorRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32_ar,
        digits32_maskgit,
        digits32_enat,
        digits32_rar,
        digits32_stream,
        digits32_bits,
        digits32_anchor_bits,
        digits32_ordered,
        digits32_holistic_ar,
        digits32_next_scale,
        photos64_mergear,
        photos64_wide_mergear,
        photos64_wide_randar,
        tiny64_mergear,
        tiny64_randar,
        tiny64_raster,
        tiny64_anchored,
        imagenet256_gr_mergear,
        imagenet256_gr_randar,
        imagenet256_gr_raster,
        imagenet256_g_mergear,
        imagenet256_g_randar,
        imagenet256_g_raster,
    )
}
"""Every recipe of a generator by name."""

TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32,
        digits32_gq32,
        digits32_bsq,
        digits32_bernoulli,
        digits32_fsq,
        digits32_vq,
        digits32_product,
        digits32_shared,
        digits32_dual,
        digits32_kl,
        digits32_perturb,
        digits32_semantic,
        digits32_preserve,
        digits32_posttrain,
        digits32_pool,
        digits32_global_map,
        digits32_divprune,
        digits32_learned_merge,
        digits32_select,
        digits32_queries,
        digits32_causal,
        digits32_tail_drop,
        digits32_nested,
        digits32_holistic,
        digits32_class,
        digits32_scales,
        photos64,
        photos64_wide,
        tiny64_g,
        tiny64_gr,
        tiny64_r,
        images128_gr,
        imagenet128_g,
        imagenet128_gr,
        imagenet128_r,
        imagenet256_g,
        imagenet256_g_d32,
        imagenet256_g_d96,
        imagenet256_gr,
        imagenet256_gr_d32,
        imagenet256_gr_d96,
        imagenet256_r,
    )
}
"""Every recipe of a tokenizer by name."""

SOURCE_RECIPES: dict[str, Callable[[], SourceRun]] = {
    recipe.__name__: recipe for recipe in (imagenet256_g_source, imagenet256_gr_source)
}
"""Every recipe of `mergevq finetune-source` by name."""

DECODER_RECIPES: dict[str, Callable[[], DecoderRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits32_prefix_flow,
        digits32_group_flow,
        digits32_knot_flow,
        digits32_pixel_flow,
    )
}
"""Every recipe of a decoder for a frozen tokenizer by name."""

RECIPES: dict[str, Callable[[], TokenizerRun | GeneratorRun | DecoderRun]] = {
    **TOKENIZER_RECIPES,
    **GENERATOR_RECIPES,
    **DECODER_RECIPES,
}
"""Every recipe of `mergevq train` by name."""


def recipe(name: str) -> TokenizerRun | GeneratorRun | DecoderRun:
    """The run of a recipe.

    Raises:
        ValueError: there is no recipe of this name.
    """
    if name not in RECIPES:
        raise ValueError(
            f"no recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}"
        )
    return RECIPES[name]()
