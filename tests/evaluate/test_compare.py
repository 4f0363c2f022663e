"""Measured numbers fit their names, and a short last batch is weighted right."""

import math

import pytest
import torch

from mergevq.data.batches import Batch
from mergevq.data.layouts import Ordered, Source
from mergevq.evaluate.compare import measure, token_agreement
from mergevq.metrics.image import psnr
from mergevq.runtime.device import autocast
from mergevq.tokenizer.seams import Encoded
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

CONFIG = tokenizer_config(
    image_size=32,
    channels=8,
    channel_mult=(1, 2, 2),
    num_kept=16,
    num_bits=8,
    num_layers=3,
    num_decoder_layers=1,
    num_heads=2,
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)


def batches(image: torch.Tensor, size: int) -> list[Batch]:
    """Images cut into batches."""
    positions = torch.arange(len(image)).split(size)
    return [
        Batch(part, torch.zeros(len(part), dtype=torch.int64), None, None, index)
        for part, index in zip(image.split(size), positions, strict=True)
    ]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(CONFIG).eval()


def run(tokenizer: Tokenizer, image: torch.Tensor, size: int) -> dict[str, float]:
    precision = autocast(torch.device("cpu"), None)
    cut = batches(image, size)
    return measure(tokenizer, cut, [16], perceptual=None, autocast=precision)[16].numbers()


def test_a_short_last_batch_does_not_change_a_number(tokenizer):
    image = torch.rand(5, 3, 32, 32) * 2 - 1
    whole, cut = run(tokenizer, image, 5), run(tokenizer, image, 2)
    assert whole == pytest.approx(cut, rel=1e-4, abs=1e-5)


def test_codebook_usage_is_of_every_token_and_not_of_the_latest(tokenizer):
    varied = torch.rand(8, 3, 32, 32) * 2 - 1
    # More tokens than codes, of which the last 256 are those of equal images.
    image = torch.cat([varied, varied[:1].expand(20, -1, -1, -1)])
    with torch.no_grad():
        distinct = len(tokenizer.encode(image, 16).indices.unique())
        latest = len(tokenizer.encode(image[-1:], 16).indices.unique())
    assert distinct > latest
    assert run(tokenizer, image, 5)["codebook_usage"] == distinct / 2**8


def test_given_source_is_the_encoders_and_psnr_is_per_image(tokenizer):
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        decoded = tokenizer.reconstruct(image, 16).image.clamp(-1, 1)
    expected = psnr(image, decoded).mean().item()
    assert run(tokenizer, image, 3)["psnr"] == pytest.approx(expected, rel=1e-5)


def test_both_sources_and_all_bits_are_reported(tokenizer):
    numbers = run(tokenizer, torch.zeros(1, 3, 32, 32), 1)
    assert {"psnr", "psnr_recovered", "ssim", "ssim_recovered", "source_accuracy"} <= set(numbers)
    # 16 tokens of 8 bits and the map of 64 cells onto 16 tokens.
    signed = [(-1) ** j * math.comb(16, j) * (16 - j) ** 64 for j in range(16)]
    maps = sum(signed) // math.factorial(16)
    assert numbers["bits"] == pytest.approx(16 * 8 + math.log2(maps))
    assert numbers["bits_per_pixel"] == pytest.approx(numbers["bits"] / 1024)


def test_a_predictor_known_to_be_wrong_is_what_the_recovered_numbers_are_of(tokenizer, monkeypatch):
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        given = tokenizer.reconstruct(image, 16)
        index = torch.zeros_like(given.source.index)
        wrong = type(given.source)(index, 16)
        monkeypatch.setattr(tokenizer, "recover", lambda *_: wrong)
        encoded = given.encoded
        decoded = tokenizer.decode(encoded.codes, wrong, encoded.grid_shape).clamp(-1, 1)
    numbers = run(tokenizer, image, 3)
    by_hand = sum(cell == 0 for row in given.source.index.tolist() for cell in row) / index.numel()
    assert numbers["source_accuracy"] == pytest.approx(by_hand)
    assert by_hand < 1
    expected = psnr(image, decoded).mean().item()
    assert numbers["psnr_recovered"] == pytest.approx(expected, rel=1e-5)
    assert numbers["psnr_recovered"] != numbers["psnr"]


def encoded_of(parts, index=None):
    """Tokens of one part of one image, at the cells of a map or in order."""
    layout = Ordered(len(parts)) if index is None else Source(torch.tensor([index]), len(parts))
    blank = torch.zeros(1, len(parts), 1)
    return Encoded(blank, torch.tensor([parts])[..., None], layout, (2, 2), blank, blank, (9,))


def test_tokens_agree_where_cells_have_the_same():
    assert token_agreement(encoded_of([1, 2, 3]), encoded_of([1, 5, 3])).item() == pytest.approx(
        2 / 3
    )
    # The same cells by another map, but for the last one.
    ours, theirs = encoded_of([4, 7], [0, 1, 1, 0]), encoded_of([4, 7, 6], [0, 1, 1, 2])
    assert token_agreement(ours, theirs).item() == 0.75


def test_what_a_flow_draws_is_encoded_again(tokenizer):
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    assert not {"token_agreement", "seam_ratio", "sharpness"} & set(run(tokenizer, image, 3))
    encoded = tokenizer.encode(image, 16)

    class Draws:
        """Images that are the original by one draw of noise, and grey by the other."""

        patch_size = 4

        def decode(self, _codes, _layout, _grid_shape, noise):
            return image[noise.image_ids] * (1 - noise.seed)

    tokenizer.flow = Draws()
    grey = tokenizer.encode(torch.zeros_like(image), 16)
    expected = (1 + token_agreement(encoded, grey).mean().item()) / 2
    for size in (3, 2):
        found = run(tokenizer, image, size)
        assert found["token_agreement"] == pytest.approx(expected)
        assert math.isinf(found["psnr"]) or found["psnr"] > 100
        assert found["seam_ratio"] == pytest.approx(1)
        assert found["sharpness"] == pytest.approx(1)
