"""Tests of `mergevq.config.tokenizer`."""

import pytest

from mergevq.config.tokenizer import KeptConfig, PatchDecoderConfig, TokenizerConfig
from mergevq.config.training import TokenizerRun
from tests.support.config import refused

PATCH = {"stem": "patch", "position_embedding": True}
PLAIN = {"stem": "patch", "patch_norm": False}


def patch_decoder(**values):
    return {"decoder": "patch", "patch_decoder": PatchDecoderConfig(**values)}


# ---------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("values", "patch_size", "num_tokens", "dim", "decoder_dim"),
    [
        ({"image_size": 256, "channel_mult": (1, 2, 4, 8), "num_kept": 256}, 8, 1024, 512, 512),
        ({"image_size": 256, "channel_mult": (1, 1, 2, 4, 8)}, 16, 256, 512, 512),
        ({"image_size": 256, "channel_mult": (1, 1, 2, 4, 8), **PATCH}, 16, 256, 768, 512),
        ({"image_size": 64, "channel_mult": (1, 2, 4)}, 4, 256, 256, 256),
        ({"image_size": 32, "channel_mult": (1, 3), "channels": 32}, 2, 256, 96, 96),
    ],
)
def test_sizes_follow_from_the_levels(values, patch_size, num_tokens, dim, decoder_dim):
    model = TokenizerConfig(**values)
    assert model.patch_size == patch_size
    assert model.num_tokens == num_tokens
    assert model.grid_size**2 == num_tokens
    assert model.dim == dim
    assert model.decoder_dim == decoder_dim


def test_groups_of_normalisation_are_32_where_the_width_has_them():
    assert TokenizerConfig(channels=64).num_groups == 32
    assert TokenizerConfig(channels=16).num_groups == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 66}, "image_size (66) must be a multiple of the patch size (4)"),
        ({"image_size": 0}, "image_size (0) must be between 1 and 65536"),
        ({"channel_mult": ()}, "channel_mult () must name one multiple per CNN level"),
        ({"channel_mult": (1, 0)}, "channel_mult (1, 0) must all be between 1"),
        ({"channels": 0}, "channels (0) must be between 1 and"),
        ({"num_layers": 0}, "num_layers (0) must be between 1 and"),
        ({"num_res_blocks": 0}, "num_res_blocks (0) must be between 1 and"),
        ({"num_source_layers": 0}, "num_source_layers (0) must be between 1 and"),
        ({"num_kept": 257}, "num_kept (257) must be between 1 and the 256 tokens"),
        ({"num_kept": 0}, "num_kept (0) must be between 1 and the 256 tokens"),
        ({"num_kept": 63, "num_layers": 2}, "num_kept (63) must be at least 64: each of"),
        ({"transformer_norm_eps": 0.0}, "transformer_norm_eps (0.0) must be above 0 and below 1"),
        ({"patch_norm_eps": float("nan")}, "patch_norm_eps (nan) must be above 0 and below 1"),
        ({"kept_range": (200, 100)}, "kept_range (200, 100) must be a smallest and a largest K"),
        ({"num_bits": 0}, "num_bits (0) must be between 1 and 63"),
        ({"num_bits": 64}, "num_bits (64) must be between 1 and 63"),
        ({"num_heads": 7}, "encoder width (256) must be a multiple of num_heads (7)"),
        ({"num_heads": 0}, "num_heads (0) must be between 1 and"),
        ({"num_decoder_heads": 7}, "decoder width (256) must be a multiple of num_decoder_heads"),
        ({"source_dim": 100}, "source_dim (100) must be a multiple of num_source_heads (8)"),
        (
            {"source_dim": 102, "num_source_heads": 2},
            "source_dim (102) must be a multiple of 4",
        ),
        (
            {"channels": 6, "num_heads": 6, "channel_mult": (1, 1, 1), "num_decoder_heads": 6}
            | {"position_embedding": True},
            "encoder width (6) must be a multiple of 4 for position_embedding",
        ),
        ({"channels": 48}, "channels (48) times each of channel_mult (1, 2, 4) must be a multiple"),
        ({"patch_dim": 72, **PATCH}, "patch_dim (72) must be a multiple of 32"),
        ({"patch_norm": False}, "patch_norm (False) needs stem patch: there is no such norm in"),
        ({**PLAIN, "position_embedding": True}, "position_embedding (True) must be False with"),
        (
            {**PLAIN, "patch_dim": 16, "channels": 8},
            "patch_dim (16) must be at least 24 with patch_norm False",
        ),
        (
            {**patch_decoder(), "channel_mult": (4,), "num_kept": 4096, "image_size": 64},
            "decoder (patch) needs cells of at least 2 x 2 pixels: give channel_mult (4,) another",
        ),
        (
            patch_decoder(bit_components=(0, 1)),
            "patch_decoder.bit_components (2) must name a component for each of the num_bits (18)",
        ),
        (
            patch_decoder(width=36),
            "decoder width (36) must be a multiple of num_decoder_heads (8)",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused(values, message):
    assert refused(TokenizerConfig, **values).startswith(message)


def test_a_run_refuses_a_number_of_tokens_that_its_layers_do_not_reach():
    model, kept = TokenizerConfig(num_layers=2), KeptConfig(candidates=(64, 36))
    assert "num_kept (36) must be at least 64" in refused(TokenizerRun, model=model, kept=kept)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30}, "patch_decoder.width (30) must be a multiple of 4"),
        ({"width": 0}, "width (0) must be between 1 and"),
        ({"blocks": ""}, "patch_decoder.blocks ('') must be letters c (convolution) and a"),
        ({"blocks": "cab"}, "patch_decoder.blocks ('cab') must be letters c (convolution) and a"),
        (
            {"bit_components": (0,) * 11 + (1,)},
            "patch_decoder.bit_components gives one component 11 bits and must give at most 10",
        ),
    ],
)
def test_a_patch_decoder_that_cannot_be_built_is_refused(values, message):
    assert refused(PatchDecoderConfig, **values).startswith(message)


def test_bits_are_grouped_by_their_component():
    groups = PatchDecoderConfig(bit_components=(0, 0, 1, 0, 2, 1)).bit_groups
    assert groups == ((0, 1, 3), (2, 5), (4,))


# ------------------------------------------------------------------------- distribution of K


@pytest.mark.parametrize(
    ("distribution", "num_candidates", "probabilities"),
    [
        ("gaussian", 6, [0.118, 0.668, 0.118, 0.032, 0.032, 0.032]),
        ("gaussian", 9, [0.108, 0.610, 0.108, *[0.029] * 6]),
        ("gaussian", 8, [0.111, 0.628, 0.111, *[0.030] * 5]),
        ("exponential", 5, [0.747, 0.132, 0.049, 0.037, 0.036]),
    ],
)
def test_the_authors_probabilities_come_out(distribution, num_candidates, probabilities):
    kept = KeptConfig(
        distribution=distribution, candidates=tuple(range(1, num_candidates + 1)), floor=0.05
    )
    assert kept.probabilities == pytest.approx(probabilities, abs=6e-4)


def test_without_a_floor_the_distributions_are_the_papers():
    exponential = KeptConfig(distribution="exponential", candidates=(1, 2, 3), rate=1.5)
    first, second, third = exponential.probabilities
    assert second / first == pytest.approx(third / second)
    # One step further is exp(-1.5) as likely.
    assert second / first == pytest.approx(0.22313, rel=1e-4)
    gaussian = KeptConfig(distribution="gaussian", candidates=(1, 2, 3), mean=1.0, std=0.5)
    # exp(-1 / (2 * 0.25)) is exp(-2).
    assert gaussian.probabilities[0] / gaussian.probabilities[1] == pytest.approx(0.13534, rel=1e-4)
    assert gaussian.probabilities[0] == gaussian.probabilities[2]


@pytest.mark.parametrize("distribution", ["uniform", "exponential", "gaussian"])
def test_probabilities_sum_to_one(distribution):
    kept = KeptConfig(distribution=distribution, candidates=tuple(range(1, 20)), floor=0.01)
    assert sum(kept.probabilities) == pytest.approx(1)


def test_a_uniform_choice_is_even_and_one_candidate_is_certain():
    assert KeptConfig(candidates=(36, 64, 100, 144)).probabilities == (0.25,) * 4
    assert KeptConfig(distribution="gaussian", candidates=(36,)).probabilities == (1,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": ()}, "candidates must name at least one number of tokens"),
        ({"candidates": (36, 0)}, "candidates (36, 0) must all be between 1 and 4294967296"),
        ({"std": 0.0}, "std (0.0) must be between 0.001 and 1000000"),
        ({"floor": -0.1}, "floor (-0.1) must be between 0 and 1000000"),
    ],
)
def test_an_impossible_distribution_is_refused(values, message):
    assert refused(KeptConfig, **values) == message
