import functools
import json
import math
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.config.recipes.digits import digits32_kl
from mergevq.config.training import Quantization
from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.data.layouts import Ordered
from mergevq.data.tokens.dataset import open_tokens
from mergevq.report.pictures import to_pil
from mergevq.tokenizer.compressed import PictureCodec, compress_image, decompress_image
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.posthoc.quantize import low_shares, quantize
from tests.support.leaves import replaced
from tests.support.small import shrink

pytest.importorskip("sklearn")
NUM_IMAGES = 6


@functools.cache
def digits():
    batches = eval_batches(
        open_images("digits"),
        image_size=32,
        batch_size=NUM_IMAGES,
        max_images=NUM_IMAGES,
        num_workers=0,
    )
    return next(batches).image


def saved(folder, **changes):
    """A small random tokenizer of real numbers in a folder."""
    torch.manual_seed(0)
    run = replaced(shrink(digits32_kl()), {f"model.{name}": new for name, new in changes.items()})
    model = Tokenizer(run.model).eval()
    for parameter in model.parameters():
        # Not where training starts: there tokens hardly differ.
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def settings(tmp_path, out="quantized", **values):
    return Quantization(
        model=str(tmp_path / "model"),
        data="digits",
        out=str(tmp_path / out),
        max_images=NUM_IMAGES,
        num_workers=0,
        **values,
    )


@pytest.mark.parametrize("kind", ["kl", pytest.param("none", marks=pytest.mark.slow)])
def test_with_ever_more_levels_pictures_become_those_of_the_autoencoder(kind, tmp_path):
    model = saved(tmp_path / "model", **{"quantizer.kind": kind})
    with torch.no_grad():
        before = model.encode(digits())
        picture = model.decode(before.codes, before.layout)
    errors = []
    for num_levels in (4, 16, 2**16):
        quantize(settings(tmp_path, num_levels=num_levels))
        found = Tokenizer.from_pretrained(tmp_path / "quantized")
        with torch.no_grad():
            after = found.encode(digits())
            decoded = found.decode(after.parts, after.layout)
        assert found.config.quantizer.kind == "dimensions"
        assert torch.equal(before.layout.index, after.layout.index)
        assert torch.equal(found.codes_of_parts(after.parts), after.codes)
        errors.append((before.codes - after.codes).square().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert (decoded - picture).abs().max() < 1e-3


def test_statistics_are_those_of_the_means_of_all_tokens(tmp_path):
    model = saved(tmp_path / "model")
    found, measured = quantize(settings(tmp_path, batch_size=5))
    with torch.no_grad():
        codes = model.encode(digits()).codes.flatten(0, 1)
    torch.testing.assert_close(found.quantizer.mean, codes.mean(0))
    torch.testing.assert_close(found.quantizer.deviation, codes.std(0, correction=0))
    assert measured.num_images == NUM_IMAGES
    assert measured.channels.num_tokens == len(codes)
    assert sorted(measured.order) == list(range(4))
    assert found.config.quantizer.channel_order == measured.order
    old, new = model.encoder.to_latents, found.encoder.to_latents
    assert torch.equal(new.weight, old.weight[:4])
    assert torch.equal(new.bias, old.bias[:4])
    others = found.state_dict().keys() - {
        *("encoder.to_latents.weight", "encoder.to_latents.bias"),
        *("quantizer.mean", "quantizer.deviation", "quantizer.levels"),
    }
    assert others
    assert all(torch.equal(found.state_dict()[name], model.state_dict()[name]) for name in others)
    record = json.loads((tmp_path / "quantized/config.json").read_text())
    assert record["extra"]["quantization"]["data"] == "digits"
    assert record["extra"]["quantization"]["num_images"] == NUM_IMAGES


def test_ordered_tokens_keep_the_order_of_their_channels(tmp_path):
    changes = {"reducer.kind": "queries", "expander.kind": "mask_tokens"}
    model = saved(tmp_path / "model", **changes)
    found, measured = quantize(settings(tmp_path))
    assert isinstance(model.encode(digits()).layout, Ordered)
    assert measured.order == found.config.quantizer.channel_order == ()


def test_low_frequencies_by_hand():
    cells = torch.arange(8.0)
    rows = [
        torch.ones(8, 8),
        (-1) ** (cells[:, None] + cells),
        torch.cos(2 * math.pi * cells / 8).expand(8, 8),
        torch.cos(2 * math.pi * 2 * cells / 8).expand(8, 8),
        # Two of three parts of the power are its mean, as the square of a cosine has a mean of 1/2.
        1 + (-1) ** cells.expand(8, 8) * math.sqrt(0.5),
    ]
    shares = low_shares(torch.stack(rows)[None])[0]
    assert shares.tolist() == pytest.approx([1, 0, 1, 0, 2 / 3], abs=1e-5)
    assert low_shares(torch.zeros(1, 1, 8, 8)).item() == 0


def test_the_command_makes_a_tokenizer_that_encodes_and_compresses(tmp_path, capsys):
    pytest.importorskip("constriction")
    model, out, images = (str(tmp_path / name) for name in ("model", "quantized", "images"))
    saved(model)
    Path(images).mkdir()
    for number, image in enumerate(digits()):
        to_pil(image).save(f"{images}/{number}.png")
    given = ["--data", images, "--num-workers", "0"]
    assert main(["quantize", model, *given, "--out", out, "--levels", "16"]) == 0
    assert "16 bits a token, 16 levels of each of 4 channels" in capsys.readouterr().out
    codec = PictureCodec.from_pretrained(out)
    compressed = compress_image(codec, to_pil(digits()[0]))
    assert decompress_image(codec, compressed.data).size == (32, 32)
    folder = tmp_path / "tokens"
    assert main(["encode", "--model", out, *given, "--out", str(folder)]) == 0
    assert open_tokens(folder).record.sizes == (16,) * 4
    assert main(["encode", "--model", model, *given, "--out", str(tmp_path / "none")]) == 1
    assert "make one with indices of it by `mergevq quantize`" in capsys.readouterr().err


def test_what_cannot_be_quantized_is_refused(tmp_path):
    saved(tmp_path / "model", **{"quantizer.kind": "fsq"})
    with pytest.raises(ValueError, match=r"quantizer.kind fsq, whose tokens have indices already"):
        quantize(settings(tmp_path))
    model = saved(tmp_path / "model")
    with pytest.raises(ValueError, match="must be another directory"):
        quantize(settings(tmp_path, out="model"))
    with pytest.raises(ValueError, match=r"num_levels \(1\) must be between 2 and 65536"):
        settings(tmp_path, num_levels=1)
    with torch.no_grad():
        model.encoder.to_latents.weight[1] = 0
        model.encoder.to_latents.bias[1] = 0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="channel 1 is the same in all 96 tokens"):
        quantize(settings(tmp_path))
    assert not (tmp_path / "quantized").exists()
