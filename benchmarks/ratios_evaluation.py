"""Evaluation and encoding at several numbers of tokens, against one number after the other."""

from functools import cache

import torch
from torch import Tensor

from benchmarks.entry import Entry, Pair
from benchmarks.ratios_images import images
from mergevq.config.recipes import TOKENIZER_RECIPES
from mergevq.generator.generation import decode_sampled
from mergevq.generator.seams import Sampled
from mergevq.metrics.comparison import Original, Originals, comparison
from mergevq.metrics.lpips import Perceptual, TrunkName
from mergevq.tokenizer.tokenizer import Encoded, Tokenizer


@cache
def tokenizer(recipe: str) -> Tokenizer:
    """A recipe's tokenizer with random weights."""
    torch.manual_seed(0)
    return Tokenizer(TOKENIZER_RECIPES[recipe]().model).eval()


def equal(plain: list[Tensor], ours: list[Tensor]) -> None:
    """Results are the same bits."""
    torch.testing.assert_close(plain, ours, rtol=0, atol=0)


@torch.inference_mode()
def encode_pair(recipe: str, count: int, num_kept: tuple[int, ...]) -> Pair:
    """Encode the same images at several K: the whole encoder each time, or the stem once."""
    model = tokenizer(recipe)
    image, _ = images(count, model.config.image_size)

    def latents(found: list[Encoded]) -> list[Tensor]:
        return [encoded.latents for encoded in found]

    @torch.inference_mode()
    def plain() -> list[Tensor]:
        return latents([model.encode(image, count) for count in num_kept])

    @torch.inference_mode()
    def ours() -> list[Tensor]:
        embedded = model.embed(image)
        return latents([model.encode(embedded, count) for count in num_kept])

    return Pair(plain, ours, equal)


def decode_pair(recipe: str, count: int) -> Pair:
    """Images of sampled tokens: one by one, or in groups of a fixed size."""
    model = tokenizer(recipe)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        model.quantizer.spec.num_values, (count, config.num_kept), generator=generator
    )
    grid = (config.grid_size, config.grid_size)

    @torch.inference_mode()
    def plain() -> Tensor:
        decoded = []
        for row in tokens.split(1):
            decoded.append(model.decode(row, model.recover(row, grid), grid))
        return torch.cat(decoded).clamp(-1, 1)

    @torch.inference_mode()
    def ours() -> Tensor:
        return decode_sampled(model, Sampled(tokens, None, None, 1, 1), grid)

    def agree(plain: Tensor, ours: Tensor) -> None:
        # A last bit may decide what the recovered source of a random model is.
        assert (plain - ours).abs().median() < 1e-3

    return Pair(plain, ours, agree)


def lpips_pair(trunk: TrunkName, count: int, side: int, num_comparisons: int) -> Pair:
    """LPIPS of images and as many reconstructions of each: both sides each time, or once."""
    torch.manual_seed(0)
    network = Perceptual(trunk)
    image, other = images(count, side)

    def plain() -> list[Tensor]:
        return [network(image, other) for _ in range(num_comparisons)]

    def ours() -> list[Tensor]:
        taps = network.taps(image)
        return [network.between(taps, network.taps(other)) for _ in range(num_comparisons)]

    return Pair(plain, ours, equal)


def compare_pair(count: int, side: int, num_comparisons: int) -> Pair:
    """All metrics of an image and its reconstructions at six K with both sources."""
    torch.manual_seed(0)
    network = Perceptual("alex")
    image, other = images(count, side)
    positions = torch.arange(count)

    def compare(originals: list[Original]) -> list[Tensor]:
        means = []
        for original in originals:
            compared = comparison(network)
            compared.update(original, other, positions)
            means.append(torch.tensor(compared.compute()["lpips"]))
        return means

    def plain() -> list[Tensor]:
        return compare([Originals(network, None).update(image) for _ in range(num_comparisons)])

    def ours() -> list[Tensor]:
        return compare([Originals(network, None).update(image)] * num_comparisons)

    return Pair(plain, ours, equal)


ENTRIES = (
    Entry("decode samples, digits32, 32 images", lambda: decode_pair("digits32", 32)),
    Entry("decode samples, tiny64_gr, 8 images", lambda: decode_pair("tiny64_gr", 8)),
    Entry(
        "encode at 3 K, images128_gr, 1 image",
        lambda: encode_pair("images128_gr", 1, (64, 144, 196)),
    ),
    Entry(
        "encode at 6 K, tiny64_gr, 4 images",
        lambda: encode_pair("tiny64_gr", 4, (36, 64, 100, 144, 196, 256)),
    ),
    Entry(
        "LPIPS (alex), 12 comparisons, 16 images of 64 px", lambda: lpips_pair("alex", 16, 64, 12)
    ),
    Entry("LPIPS (vgg), 6 comparisons, 1 image of 128 px", lambda: lpips_pair("vgg", 1, 128, 6)),
    Entry("all metrics, 12 comparisons, 16 images of 64 px", lambda: compare_pair(16, 64, 12)),
    Entry("all metrics, 12 comparisons, 1 image of 256 px", lambda: compare_pair(1, 256, 12)),
)
