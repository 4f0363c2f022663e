"""Tests of `mergevq.config.tokenizer`."""

import pytest

from mergevq.config.parts import CnnDecoder, CnnStem, Merge, PatchDecoder, PatchStem
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig, with_cnn
from mergevq.config.training import TokenizerRun
from tests.support.config import refused

LEVELS = (1, 1, 2, 4, 8)
BIG = {
    "image_size": 256,
    "stem": CnnStem(channel_mult=LEVELS),
    "decoder": CnnDecoder(channel_mult=LEVELS),
}

# ---------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("values", "patch_size", "num_tokens", "dim"),
    [
        (
            {
                "image_size": 256,
                "stem": CnnStem(channel_mult=(1, 2, 4, 8)),
                "decoder": CnnDecoder(channel_mult=(1, 2, 4, 8)),
                "num_kept": 256,
            },
            8,
            1024,
            512,
        ),
        (BIG, 16, 256, 512),
        ({**BIG, "stem": PatchStem()}, 16, 256, 768),
        ({"image_size": 64}, 4, 256, 256),
        (
            {
                "image_size": 32,
                "stem": CnnStem(channels=32, channel_mult=(1, 3)),
                "decoder": PatchDecoder(),
            },
            2,
            256,
            96,
        ),
    ],
)
def test_sizes_follow_from_the_stem(values, patch_size, num_tokens, dim):
    model = TokenizerConfig(**values)
    assert model.patch_size == model.stem.patch_size == patch_size
    assert model.num_tokens == num_tokens
    assert model.grid_size**2 == num_tokens
    assert model.dim == model.stem.width == dim


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 66}, "image_size (66) must be a multiple of the patch size (4)"),
        ({"image_size": 0}, "image_size (0) must be between 1 and 65536"),
        ({"num_kept": 257}, "num_kept (257) must be between 1 and the 256 tokens"),
        ({"num_kept": 0}, "num_kept (0) must be between 1 and the 256 tokens"),
        (
            {"num_kept": 63, "reducer": Merge(num_layers=2)},
            "num_kept (63) must be at least 64: each of reducer.num_layers (2) can merge at most "
            "half of its tokens and the first has 256",
        ),
        ({"kept_range": (200, 100)}, "kept_range (200, 100) must be a smallest and a largest K"),
        ({"kept_range": (0, 100)}, "kept_range (0, 100) must all be between 1 and"),
        (
            {"reducer": Merge(num_heads=7)},
            "encoder width (256) must be a multiple of reducer.num_heads (7)",
        ),
        (
            {
                "stem": CnnStem(channels=6, channel_mult=(1, 1, 1), position_embedding=True),
                "reducer": Merge(num_heads=6),
            },
            "encoder width (6) must be a multiple of 4 for position_embedding",
        ),
        (
            {"decoder": CnnDecoder(channel_mult=(1, 2))},
            "decoder.channel_mult (1, 2) must make the stem's cells of 4 x 4 pixels, and makes 2 x "
            "2: every level but one doubles the side",
        ),
        (
            {"stem": CnnStem(channel_mult=(4,)), "decoder": PatchDecoder(), "num_kept": 4096},
            "decoder (patch) needs cells of an even number of pixels a side, not 1",
        ),
        (
            {"decoder": PatchDecoder(bit_components=(0, 1))},
            "decoder.bit_components (2) must name a component for each of the 18 channels of a",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(values, message):
    assert refused(TokenizerConfig, **values).startswith(message)


def test_a_run_refuses_a_number_of_tokens_that_its_layers_do_not_reach():
    model = TokenizerConfig(reducer=Merge(num_layers=2))
    kept = KeptConfig(candidates=(64, 36))
    assert "num_kept (36) must be at least 64" in refused(TokenizerRun, model=model, kept=kept)


@pytest.mark.parametrize(
    ("model", "num_carried"),
    [
        # 128 channels in pairs: 20 positions, 18 bits and a constant leave 25 components.
        (TokenizerConfig(**BIG | {"stem": PatchStem(width=128, norm=False)}), 25),
        # There are no more than the numbers in a patch of 2 x 2.
        (
            TokenizerConfig(
                stem=PatchStem(width=128, patch_size=2, norm=False), decoder=PatchDecoder()
            ),
            12,
        ),
        # A CNN carries nothing.
        (TokenizerConfig(), -1),
    ],
)
def test_an_analytic_start_carries_what_its_width_has_room_for(model, num_carried):
    assert model.num_carried == num_carried


def test_cnns_of_stem_and_decoder_are_changed_together():
    model = with_cnn(TokenizerConfig(), channels=32, num_res_blocks=1)
    assert model.stem == CnnStem(channels=32, num_res_blocks=1)
    assert model.decoder == CnnDecoder(channels=32, num_res_blocks=1)
    patches = TokenizerConfig(decoder=PatchDecoder())
    assert with_cnn(patches, channels=32).decoder == PatchDecoder()
    deeper = with_cnn(TokenizerConfig(), channel_mult=(1, 2))
    assert deeper.patch_size == 2
    assert with_cnn(model) == model


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
