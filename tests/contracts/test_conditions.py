"""Every reader of images or tokens takes the condition of a tokenizer, or refuses it."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from mergevq.cli.tables import reconstruction_table
from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.evaluation import ReconstructionSettings, RobustnessSettings, Subject
from mergevq.config.recipes.decoders import digits32_prefix_flow
from mergevq.config.recipes.digits import digits32
from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.evaluate.reconstruction import evaluate_reconstruction
from mergevq.evaluate.robustness.run import evaluate_robustness
from mergevq.generator.export.folder import export_folder
from mergevq.generator.generation import decode_sampled
from mergevq.generator.seams import Sampled
from mergevq.metrics.image import psnr
from mergevq.report.pictures import to_pil
from mergevq.runtime import distributed
from mergevq.tokenizer.codec import encode_image, reconstruct_image
from mergevq.tokenizer.compressed import PictureCodec
from mergevq.tokenizer.encode import encode, encode_images, token_record
from mergevq.tokenizer.export.graphs import tokenizer_graphs
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.contest.measure import points
from mergevq.training.decoder.run import train as train_decoder
from tests.support.leaves import replaced
from tests.support.small import shrink

NUM_KEPT = 16


@functools.cache
def small(kind):
    """A small random tokenizer with a condition of this kind."""
    torch.manual_seed(0)
    model = Tokenizer(replaced(shrink(digits32()), {"model.condition.kind": kind}).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


NO_PLACE = "has no place for a condition, and this tokenizer has one"


@pytest.mark.parametrize("kind", ["class", "text"])
def test_what_has_no_place_for_a_condition_refuses_it(kind, tmp_path):
    pytest.importorskip("sklearn")
    model = small(kind)
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    arm = Arm(name="an arm", run=replace(digits32(), model=model.config))
    contest = ContestSettings(arms=(arm,), num_kept=(NUM_KEPT,))
    picture = to_pil(torch.zeros(3, 32, 32))
    decoder = digits32_prefix_flow()
    data = replace(decoder.data, max_images=12)
    decoder = replace(decoder, tokenizer=folder, data=data, out=str(tmp_path / "run"))
    for refused in (
        lambda: PictureCodec.from_pretrained(folder),
        lambda: reconstruct_image(model, picture),
        lambda: encode_image(model, picture),
        lambda: tokenizer_graphs(model, (NUM_KEPT,)),
        lambda: export_folder(folder, tmp_path / "graphs", "pt2"),
        lambda: points(contest, arm),
        lambda: train_decoder(decoder),
    ):
        with pytest.raises(ValueError, match=NO_PLACE):
            refused()


def test_texts_are_refused_where_images_come_with_classes_alone(tmp_path):
    pytest.importorskip("sklearn")
    small("text").save_pretrained(tmp_path / "model")
    subject = Subject(model=str(tmp_path / "model"), data="digits", max_images=2, num_workers=0)
    for refused in (
        lambda: encode(tmp_path / "model", "digits", tmp_path / "tokens", num_workers=0),
        lambda: evaluate_reconstruction(
            ReconstructionSettings(subject=subject, out=str(tmp_path / "evaluation"))
        ),
        lambda: evaluate_robustness(
            RobustnessSettings(subject=subject, out=str(tmp_path / "robustness"))
        ),
    ):
        with pytest.raises(ValueError, match="has the classes of images and no texts"):
            refused()
    assert not (tmp_path / "tokens").exists()


def test_images_are_evaluated_stored_and_sampled_with_their_classes(tmp_path):
    pytest.importorskip("sklearn")
    model = small("class")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    subject = Subject(model=str(folder), data="digits", max_images=6, num_workers=0)
    settings = ReconstructionSettings(
        subject=subject, num_kept=(NUM_KEPT,), num_baseline_images=0, out=str(tmp_path / "out")
    )
    record = evaluate_reconstruction(settings)
    (result,) = record["results"]
    (batch,) = eval_batches(
        open_images("digits"), image_size=32, batch_size=6, max_images=6, num_workers=0
    )
    with torch.no_grad():
        encoded = model.encode(batch.image, NUM_KEPT, batch.label)
        decoded = {
            name: model.decode(encoded.codes, encoded.layout, condition=condition)
            for name, condition in (
                ("psnr", batch.label),
                ("psnr_no_class", torch.full_like(batch.label, -1)),
                ("psnr_wrong_class", (batch.label + 1 + batch.index % 9) % 10),
            )
        }
    for name, image in decoded.items():
        expected = float(psnr(batch.image, image).mean())
        assert result["given"]["metrics"][name] == pytest.approx(expected, abs=1e-4)
    assert result["bits"]["condition"] == pytest.approx(math.log2(10))
    total = result["bits"]["tokens"] + math.log2(10)
    assert result["bits"]["total"] == pytest.approx(total)
    table = reconstruction_table(record)
    for words in ("bits, condition", "psnr_wrong_class", "psnr_no_class"):
        assert words in table
    robust = RobustnessSettings(subject=subject, num_kept=NUM_KEPT, out=str(tmp_path / "bits"))
    clean = evaluate_robustness(robust)["results"][0]
    assert clean["metrics"]["psnr"] == pytest.approx(result["given"]["metrics"]["psnr"])
    pixels = open_images("digits").subset(range(6))
    record = token_record(model, "a" * 64, pixels, data="digits", num_kept=(NUM_KEPT,))
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    rows = encode_images(
        model, pixels, tmp_path / "tokens", record, world, batch_size=64, num_workers=0
    )
    stored = rows.batch(range(6))
    with torch.no_grad():
        (batch,) = eval_batches(pixels, image_size=32, batch_size=6, num_workers=0)
        again = model.encode(batch.image, NUM_KEPT, batch.label)
        assert torch.equal(stored.parts, again.parts)
        sampled = Sampled(stored.indices, None, None, 1, 0)
        expected = model.decode(again.codes, again.layout, condition=batch.label)
        found = decode_sampled(model, sampled, (8, 8), labels=batch.label)
        torch.testing.assert_close(found, expected.clamp(-1, 1))
        with pytest.raises(ValueError, match="needs the class of each image"):
            decode_sampled(model, sampled, (8, 8))
