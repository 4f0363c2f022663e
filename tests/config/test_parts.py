"""Tests of `mergevq.config.parts`: each kind of part by itself."""

import math

import pytest

from mergevq.config.objective import LossConfig
from mergevq.config.parts import (
    Bernoulli,
    Bsq,
    CnnDecoder,
    CnnStem,
    Codebook,
    EmaUpdate,
    Fsq,
    GradientUpdate,
    GroupedLfq,
    Lfq,
    Merge,
    PatchDecoder,
    PatchStem,
    Product,
    Residual,
    Shared,
    TwoBranches,
    Unmerge,
    bits_of,
    weights_of,
)
from tests.support.config import refused

# ------------------------------------------------------------------------------ stem, decoder


@pytest.mark.parametrize("part", [CnnStem, CnnDecoder])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_mult": ()}, "channel_mult () must name one multiple per CNN level"),
        ({"channel_mult": (1, 0)}, "channel_mult (1, 0) must all be between 1"),
        ({"channels": 0}, "channels (0) must be between 1 and"),
        ({"channels": 48}, "channels (48) times each of channel_mult (1, 2, 4) must be a multiple"),
        ({"num_res_blocks": 0}, "num_res_blocks (0) must be between 1 and"),
    ],
)
def test_a_cnn_that_cannot_be_built_is_refused(part, values, message):
    assert refused(part, **values).startswith(message)


@pytest.mark.parametrize("part", [CnnStem, CnnDecoder])
def test_width_and_groups_of_a_cnn_follow_from_its_levels(part):
    wide, narrow = part(channels=64, channel_mult=(1, 3)), part(channels=16)
    assert (wide.width, narrow.width) == (192, 64)
    # Groups of normalisation are 32 where the width has them.
    assert (wide.num_groups, narrow.num_groups) == (32, 16)


@pytest.mark.parametrize(("levels", "patch_size"), [((1,), 1), ((1, 2), 2), ((1, 1, 1, 1, 1), 16)])
def test_every_level_but_one_halves_the_side_in_the_stem_and_doubles_it_in_the_decoder(
    levels, patch_size
):
    assert CnnStem(channel_mult=levels).patch_size == patch_size
    decoder = CnnDecoder(channel_mult=levels)
    decoder.check_patch(patch_size)
    with pytest.raises(ValueError, match=f"and makes {patch_size} x {patch_size}: every"):
        decoder.check_patch(2 * patch_size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width (0) must be between 1 and"),
        ({"patch_size": 0}, "patch_size (0) must be between 1 and"),
        ({"num_groups": 0}, "num_groups (0) must be between 1 and"),
        ({"width": 72}, "width (72) must be a multiple of the 32 normalisation groups (num_group"),
        ({"norm_eps": math.nan}, "norm_eps (nan) must be above 0 and below 1"),
        ({"norm_eps": 1.0}, "norm_eps (1.0) must be above 0 and below 1"),
        ({"norm": False, "position_embedding": True}, "position_embedding (True) must be False"),
        ({"norm": False, "width": 16, "num_groups": 8}, "width (16) must be at least 24 with norm"),
    ],
)
def test_a_patch_stem_that_cannot_be_built_is_refused(values, message):
    assert refused(PatchStem, **values).startswith(message)


def test_a_third_of_the_channels_without_norm_are_positions():
    # A pair of channels each: rows and columns, sine and cosine, of 5 wavelengths.
    assert PatchStem(width=128, norm=False).num_positions == 20
    assert PatchStem(width=768, norm=False).num_positions == 128


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": -1}, "num_layers (-1) must be between 0 and"),
        ({"num_heads": 7}, "decoder width (256) must be a multiple of decoder.num_heads (7)"),
        ({"num_heads": 0}, "num_heads (0) must be between 1 and"),
        ({"norm_eps": 0.0}, "norm_eps (0.0) must be above 0 and below 1"),
    ],
)
def test_a_cnn_decoder_that_cannot_be_built_is_refused(values, message):
    assert refused(CnnDecoder, **values).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30}, "decoder.width (30) must be a multiple of 4"),
        ({"width": 0}, "width (0) must be between 1 and"),
        ({"width": 36}, "decoder width (36) must be a multiple of decoder.num_heads (8)"),
        ({"blocks": ""}, "decoder.blocks ('') must be letters c (convolution) and a"),
        ({"blocks": "cab"}, "decoder.blocks ('cab') must be letters c (convolution) and a"),
        (
            {"bit_components": (0,) * 11 + (1,)},
            "decoder.bit_components gives one component 11 bits and must give at most 10",
        ),
    ],
)
def test_a_patch_decoder_that_cannot_be_built_is_refused(values, message):
    assert refused(PatchDecoder, **values).startswith(message)


@pytest.mark.parametrize("patch_size", [1, 3])
def test_a_patch_decoder_makes_quarters_of_cells(patch_size):
    PatchDecoder().check_patch(2)
    with pytest.raises(ValueError, match=f"an even number of pixels a side, not {patch_size}"):
        PatchDecoder().check_patch(patch_size)


def test_bits_are_grouped_by_their_component():
    groups = PatchDecoder(bit_components=(0, 0, 1, 0, 2, 1)).bit_groups
    assert groups == ((0, 1, 3), (2, 5), (4,))


# ------------------------------------------------------------------ reducer, quantizer, expander


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (Merge, {"num_layers": 0}, "num_layers (0) must be between 1 and"),
        (Merge, {"norm_eps": 0.0}, "norm_eps (0.0) must be above 0 and below 1"),
        (Lfq, {"num_bits": 0}, "num_bits (0) must be between 1 and 63"),
        (Lfq, {"num_bits": 64}, "num_bits (64) must be between 1 and 63"),
        (Lfq, {"entropy_temperature": 0.0}, "entropy_temperature (0.0) must be above 0"),
        (GroupedLfq, {"num_bits": 257}, "num_bits (257) must be between 1 and 256"),
        (GroupedLfq, {"group_bits": 17}, "group_bits (17) must be between 1 and 16"),
        (GroupedLfq, {"num_bits": 20}, "num_bits (20) must be a multiple of group_bits (8)"),
        (Bsq, {"num_bits": 64}, "num_bits (64) must be between 1 and 63"),
        (Bsq, {"entropy_temperature": 0.0}, "entropy_temperature (0.0) must be above 0"),
        (Bernoulli, {"num_bits": 64}, "num_bits (64) must be between 1 and 63"),
        (Bernoulli, {"sample_temperature": 0.0}, "sample_temperature (0.0) must be above 0"),
        (Bernoulli, {"confidence_weight": -1.0}, "confidence_weight (-1.0) must be between 0"),
        (
            Fsq,
            {"levels": (8, 2)},
            "levels (8, 2): a channel of 2 would be -1 and 0, and no sign, for",
        ),
        (Fsq, {"levels": (8, 1)}, "levels (8, 1) must all be between 3 and 1000"),
        (Fsq, {"levels": (1001,)}, "levels (1001,) must all be between 3 and 1000"),
        (
            Fsq,
            {"levels": ()},
            "levels () must be those of at least one channel",
        ),
        (GroupedLfq, {"num_bits": 264}, "num_bits (264) must be between 1 and 256"),
        (Codebook, {"codebook_size": 1}, "codebook_size (1) must be between 2 and 1048576"),
        (Codebook, {"dim": 0}, "dim (0) must be between 1 and"),
        (Product, {"num_codebooks": 0}, "num_codebooks (0) must be between 1 and 256"),
        (Product, {"book_dim": 0}, "book_dim (0) must be between 1 and"),
        (Product, {"orthogonality_weight": -1.0}, "orthogonality_weight (-1.0) must be between 0"),
        (Shared, {"branch_dims": ()}, "branch_dims () must be those of at least one branch"),
        (
            Shared,
            {"distance_weights": (1.0,)},
            "distance_weights (1.0,) must be as many as branch_dims (32, 8), and not all 0",
        ),
        (Shared, {"distance_weights": (0.0, 0.0)}, "distance_weights (0.0, 0.0) must be as many"),
        (Residual, {"branch_dims": ()}, "branch_dims () must be those of at least one branch"),
        (Residual, {"depth": 0}, "depth (0) must be between 1 and"),
        (TwoBranches, {"taps": ()}, "branches.taps () must name at least one block"),
        (TwoBranches, {"taps": (1, 2)}, "branches.gains (1.0,) must be as many as branches.taps"),
        (TwoBranches, {"semantic_dim": 0}, "semantic_dim (0) must be between 1 and"),
        (GradientUpdate, {"codebook_weight": -1.0}, "codebook_weight (-1.0) must be between 0"),
        (EmaUpdate, {"decay": 1.0}, "decay (1.0) must be at least 0 and below 1"),
        (EmaUpdate, {"restart_below": 1.5}, "restart_below (1.5) must be between 0 and 1"),
        (Unmerge, {"num_layers": 0}, "num_layers (0) must be between 1 and"),
        (Unmerge, {"dim": 100}, "expander.dim (100) must be a multiple of expander.num_heads (8)"),
        (Unmerge, {"dim": 102, "num_heads": 2}, "expander.dim (102) must be a multiple of 4"),
    ],
)
def test_other_parts_that_cannot_be_built_are_refused(part, values, message):
    assert refused(part, **values).startswith(message)


@pytest.mark.parametrize(
    ("num_layers", "num_tokens", "least"),
    [(1, 64, 32), (2, 64, 16), (3, 65, 9), (12, 256, 1), (1, 1, 1)],
)
def test_every_block_can_merge_half_of_its_tokens(num_layers, num_tokens, least):
    reducer = Merge(num_layers=num_layers)
    grid = (1, num_tokens)
    assert reducer.least_kept(grid) == least
    reducer.check_kept(grid, least)
    if least > 1:
        with pytest.raises(ValueError, match=rf"num_kept \({least - 1}\) must be at least {least}"):
            reducer.check_kept(grid, least - 1)
    for num_kept in (0, num_tokens + 1):
        with pytest.raises(ValueError, match=rf"must be between 1 and the {num_tokens} tokens"):
            reducer.check_kept(grid, num_kept)


def test_the_nearest_number_of_tokens_is_one_that_can_be_left():
    reducer = Merge(num_layers=2)
    assert [reducer.nearest_kept((8, 8), num_kept) for num_kept in (3, 16, 40)] == [16, 16, 40]


@pytest.mark.parametrize("part", [Lfq, Bsq, Bernoulli])
def test_a_token_of_signs_is_one_index(part):
    quantizer = part(num_bits=10)
    assert (quantizer.sizes, quantizer.dim) == ((1024,), 10)
    assert bits_of(quantizer.sizes) == 10


def test_groups_of_bits_are_parts():
    quantizer = GroupedLfq(num_bits=12, group_bits=4)
    assert (quantizer.sizes, quantizer.dim) == ((16, 16, 16), 12)
    assert bits_of(quantizer.sizes) == 12


def test_levels_are_parts():
    quantizer = Fsq(levels=(8, 6, 5))
    assert (quantizer.sizes, quantizer.dim) == ((8, 6, 5), 3)
    assert bits_of(quantizer.sizes) == pytest.approx(7.9069, abs=1e-4)


def test_tables_are_parts():
    quantizer = Product(num_codebooks=3, codebook_size=32, book_dim=5)
    assert (quantizer.sizes, quantizer.dim) == ((32, 32, 32), 15)
    assert bits_of(quantizer.sizes) == 15


def test_one_index_into_two_tables_is_one_part():
    quantizer = Shared(codebook_size=32, branch_dims=(5, 3))
    assert (quantizer.sizes, quantizer.dim) == ((32,), 8)


def test_each_code_of_each_branch_is_a_part():
    quantizer = Residual(codebook_size=32, depth=3, branch_dims=(5, 3))
    assert (quantizer.sizes, quantizer.dim) == ((32,) * 6, 8)


def test_weights_are_the_settings_that_are_called_so():
    assert weights_of(Bernoulli(confidence_weight=0.5)) == {"confidence": 0.5}
    assert weights_of(Lfq()) == {}
    assert weights_of(Codebook(update=GradientUpdate(codebook_weight=0.5))) == {"codebook": 0.5}
    assert weights_of(Codebook(update=EmaUpdate())) == {}
    assert weights_of(Product()) == {"orthogonality": 0.1, "codebook": 1.0}
    assert weights_of(LossConfig(source_weight=3.0))["source"] == 3


def test_bits_of_parts_add_up():
    assert bits_of((2, 8, 16)) == 8
    assert bits_of((3,)) == pytest.approx(1.58496, abs=1e-5)
    # As large as they are, nothing is rounded.
    assert bits_of((2**63,) * 7) == 441
