"""How well images come back, with the given and with the recovered source.

Source: Li et al. 2025, "MergeVQ", section 4 and Table 2 (arXiv:2504.00999).

Differs: every number is reported for the recovered source too, PSNR is per image, and the bits of
the source map are counted beside those of the tokens.
"""

from collections.abc import Iterable, Iterator

import torch

from mergevq.data import Batch
from mergevq.metrics import CodebookUsage, Mean, psnr, source_accuracy, ssim
from mergevq.perceptual import Perceptual
from mergevq.tokenizer import Tokenizer


@torch.no_grad()
def measure(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    num_kept: int,
    *,
    perceptual: Perceptual | None,
    autocast: torch.autocast,
) -> Iterator[tuple[str, float]]:
    """Reconstruct images and yield (name, value) of every number, given source first.

    Args:
        tokenizer: in evaluation mode, where it is to run.
        batches: each image once over all ranks; see `mergevq.data.eval_batches`.
        num_kept: K.
        perceptual: network for LPIPS; None leaves it out.
        autocast: precision of encoder and decoder; metrics are always float32.

    Yields:
        `psnr`, `ssim`, `l1`, `lpips` and their `_recovered` twins, `source_accuracy`,
        `codebook_usage`, `perplexity`, `bits` and `bits_per_pixel` of one image, `num_images`.
    """
    means: dict[str, Mean] = {}
    device = next(tokenizer.parameters()).device
    usage = CodebookUsage(tokenizer.config.num_bits, device=device)
    bits = num_pixels = 0.0
    for batch in batches:
        image = batch.image.to(device)
        with autocast:
            given = tokenizer.reconstruct(image, num_kept)
            source = tokenizer.recover(given.encoded.codes, given.encoded.grid_shape)
            recovered = tokenizer.decode(given.encoded.codes, source, given.encoded.grid_shape)
        usage.update(given.encoded.indices)
        values = {"source_accuracy": source_accuracy(source.index, given.source.index)}
        for suffix, decoded in (("", given.image), ("_recovered", recovered)):
            shown = decoded.float().clamp(-1, 1)
            values[f"psnr{suffix}"] = psnr(image, shown)
            values[f"ssim{suffix}"] = ssim(image, shown)
            values[f"l1{suffix}"] = (image - shown).abs().mean((1, 2, 3))
            if perceptual is not None:
                values[f"lpips{suffix}"] = perceptual(image, shown)
        for name, value in values.items():
            means.setdefault(name, Mean(name, infinite=name.startswith("psnr"))).update(value)
        bits = given.source.bits(tokenizer.config.num_bits).total
        num_pixels = image.shape[2] * image.shape[3]
    for name, mean in means.items():
        yield name, mean.compute().mean
    statistics = usage.compute()
    yield "codebook_usage", statistics.usage
    yield "perplexity", statistics.perplexity
    yield "bits", bits
    yield "bits_per_pixel", bits / num_pixels
    yield "num_images", float(means["psnr"].compute().num_items)
