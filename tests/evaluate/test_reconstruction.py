"""An identity is perfect, a number is the same each time, and what does not fit is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.evaluation import ReconstructionSettings, Subject
from mergevq.config.records import ReconstructionRecord
from mergevq.data.coding.maps import map_bits
from mergevq.evaluate.reconstruction import (
    evaluate_reconstruction,
    measure_reconstructions,
    rate_distortion,
)
from mergevq.metrics.baselines import file_formats
from mergevq.metrics.image import authors_ssim, psnr, to_uint8
from mergevq.metrics.lpips import Perceptual
from mergevq.metrics.references import make_reference
from mergevq.runtime.environment import EXTRAS
from mergevq.runtime.run import environment
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import CONFIG, subject_of, write_images
from tests.support.records import assert_declared, problems
from tests.support.tables import table_of

FEW = "ignore:a (Frechet distance|reference) of:UserWarning"
pytestmark = pytest.mark.filterwarnings(FEW)


class Identity(Tokenizer):
    """Gives back what it was given."""

    def embed(self, image):
        self.image = image
        return super().embed(image)

    def decode(self, *_given, **_more):
        return self.image


def settings(folder, out, *, num_kept=(8,), reference=None, **subject):
    given = {"model": str(folder / "model"), "data": str(folder / "images"), "device": "cpu"}
    given |= {"extractor": str(folder / "colours.pt"), "batch_size": 4, "num_workers": 0}
    return ReconstructionSettings(
        subject=Subject(**given | subject),
        out=str(out),
        num_kept=num_kept,
        reference=None if reference is None else str(reference),
        num_shown=2,
        num_baseline_images=3,
    )


def write_reference(folder, path, kind, *, data="images", image_size=16):
    make_reference(
        str(folder / data),
        path,
        kind,
        extractor=folder / "colours.pt",
        image_size=image_size,
        batch_size=4,
        device="cpu",
    )
    return path


# ----------------------------------------------------------------------------- what is measured


def test_an_identity_is_at_no_distance_and_infinite_psnr(tmp_path, folder):
    images = write_images(tmp_path / "images", 3, size=32)
    subject = subject_of(
        Identity(replace(CONFIG, image_size=32, num_kept=24)),
        images,
        folder / "colours.pt",
        Perceptual("squeeze"),
        batch_size=2,
    )
    (found,) = measure_reconstructions(subject, [24]).measured
    for numbers in (found.outcome.given, found.outcome.recovered):
        assert numbers["psnr"] == float("inf")
        assert numbers["num_exact"] == 3
        assert "psnr_finite" not in numbers
        assert numbers["ssim"] == 1
        assert numbers["l1"] == numbers["lpips"] == 0
        assert numbers["feature_cosine_colours"] == pytest.approx(1, abs=1e-6)
        assert 0 <= numbers["frechet_colours"] < 1e-3


def test_psnr_is_the_mean_over_images_and_the_worst_come_first(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    subject = subject_of(tokenizer, folder / "images", batch_size=3)
    image = torch.cat([batch.image for batch in subject.batches()])
    with torch.no_grad():
        expected = psnr(image, tokenizer.reconstruct(image, 8).image.clamp(-1, 1))
    (found,) = measure_reconstructions(subject, [8], num_shown=2).measured
    assert found.outcome.given["psnr"] == pytest.approx(float(expected.mean()), rel=1e-5)
    order = expected.argsort().tolist()
    assert [extreme.position for extreme in found.worst] == order[:2]
    assert [extreme.position for extreme in found.best] == order[:-3:-1]


def test_every_token_is_counted_and_every_bit(folder):
    subject = subject_of(Tokenizer.from_pretrained(folder / "model"), folder / "images")
    (found,) = measure_reconstructions(subject, [8]).measured
    # More than the 16 codes that a codebook of 4 bits has.
    assert found.outcome.codebook.num_tokens == 7 * 8
    assert len(found.outcome.codebook.bit_probs) == 4
    assert found.outcome.bits.tokens == 8 * 4


def test_maps_cost_what_is_written_of_them(folder, monkeypatch):
    subject = subject_of(Tokenizer.from_pretrained(folder / "model"), folder / "images")
    image = torch.cat([batch.image for batch in subject.batches()])
    with torch.no_grad():
        bits = map_bits(subject.tokenizer.encode(image, 8).source)
    for count, chosen in ((7, bits), (2, [bits[0], bits[3]])):
        (found,) = measure_reconstructions(subject, [8], num_baseline_images=count).measured
        assert found.outcome.map_bits == pytest.approx(sum(chosen) / count)
    (found,) = measure_reconstructions(subject, [8]).measured
    assert found.outcome.map_bits is None
    monkeypatch.setitem(EXTRAS, "codec", ("no-such-package",))
    (found,) = measure_reconstructions(subject, [8], num_baseline_images=2).measured
    assert found.outcome.map_bits is None


def test_merging_can_be_off(folder):
    subject = subject_of(Tokenizer.from_pretrained(folder / "model"), folder / "images")
    (found,) = measure_reconstructions(subject, [16]).measured
    assert found.outcome.bits.source == 0
    assert found.outcome.source_accuracy == 1
    assert found.outcome.given == found.outcome.recovered


def test_several_k_give_the_numbers_of_each_and_see_an_original_once(tmp_path, folder, monkeypatch):
    images = write_images(tmp_path / "images", 3, size=32)
    tokenizer = Tokenizer(replace(CONFIG, image_size=32, num_kept=24)).eval()
    network = Perceptual("squeeze")
    subject = subject_of(tokenizer, images, folder / "colours.pt", network, batch_size=2)
    alone = [measure_reconstructions(subject, [count]).measured[0] for count in (16, 24)]
    seen = {"stem": 0, "taps": 0}

    def counting(name, function):
        def count(image):
            seen[name] += len(image)
            return function(image)

        return count

    monkeypatch.setattr(tokenizer, "embed", counting("stem", tokenizer.embed))
    monkeypatch.setattr(network, "taps", counting("taps", network.taps))
    together = measure_reconstructions(subject, [16, 24, 16]).measured
    # Each original once, and the reconstructions with both sources at both K.
    assert seen == {"stem": 3, "taps": 3 + 3 * 2 * 2}
    for one, of_both in zip(alone, together, strict=True):
        assert one.outcome.given == of_both.outcome.given
        assert one.outcome.recovered == of_both.outcome.recovered
        assert one.outcome.images_per_second > 0


def test_a_batch_size_changes_no_number(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    found = [
        measure_reconstructions(
            subject_of(tokenizer, folder / "images", folder / "colours.pt", batch_size=size), [8]
        )
        for size in (2, 7)
    ]
    first, second = (one.measured[0].outcome for one in found)
    assert first.given == pytest.approx(second.given, rel=1e-4)
    assert found[0].pixels_sha256 == found[1].pixels_sha256


def test_the_protocol_of_the_authors_resizes_and_compares_in_their_way(tmp_path, folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    images = write_images(tmp_path / "large", 4, size=40)
    subject = subject_of(tokenizer, images, folder / "colours.pt", protocol="authors")
    found = measure_reconstructions(subject, [8])
    seen = torch.cat([batch.image for batch in subject.batches()])
    for number, path in enumerate(sorted(images.glob("*.png"))):
        with Image.open(path) as image:
            small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
        # The image itself loses nothing, whatever float32 made of its bytes on the way.
        found_bytes = to_uint8(seen[number], truncated=True).permute(1, 2, 0).numpy()
        assert np.array_equal(found_bytes, small)
    with torch.no_grad():
        decoded = tokenizer.reconstruct(seen, 8).image.clamp(-1, 1)
    given = found.measured[0].outcome.given
    assert given["ssim"] == pytest.approx(float(authors_ssim(seen, decoded).mean()), abs=1e-5)
    expected = psnr(seen, decoded, truncated=True).mean()
    assert given["psnr"] == pytest.approx(float(expected), abs=1e-4)
    features = subject.extractor.features((decoded + 1) * 127.5)
    cosine = torch.cosine_similarity(features, subject.extractor.features(to_uint8(seen))).mean()
    assert given["feature_cosine_colours"] == pytest.approx(float(cosine), abs=1e-5)
    own = subject_of(tokenizer, images, folder / "colours.pt")
    assert measure_reconstructions(own, [8]).pixels_sha256 != found.pixels_sha256


def test_an_illegal_k_is_refused_before_any_image(folder):
    subject = subject_of(Tokenizer.from_pretrained(folder / "model"), folder / "images")
    with pytest.raises(ValueError, match="17"):
        measure_reconstructions(subject, [8, 17])


# ------------------------------------------------------------------------------ what is written


@pytest.mark.slow
def test_two_evaluations_agree_to_the_last_digit(tmp_path, folder):
    records = [
        evaluate_reconstruction(settings(folder, tmp_path / name, num_kept=(8, 16)))
        for name in ("first", "second")
    ]
    for record in records:
        del record["settings"]["out"]
        for result in record["results"]:
            assert result.pop("images_per_second") > 0
    assert records[0] == records[1]
    for name in ("rate_distortion.png", "worst_best_8.png", "worst_best_16.png"):
        pictures = [(tmp_path / run / name).read_bytes() for run in ("first", "second")]
        assert pictures[0] == pictures[1]


def test_each_source_is_drawn_at_the_price_that_it_has(folder):
    subject = subject_of(Tokenizer.from_pretrained(folder / "model"), folder / "images")
    found = measure_reconstructions(subject, [8, 16], num_baseline_images=7)
    given, recovered, *files = rate_distortion(found, 16)
    tokens, source, _ = zip(*[measured.outcome.bits for measured in found.measured], strict=True)
    assert recovered.x == [8 * 4 / 256, 16 * 4 / 256] == [bits / 256 for bits in tokens]
    assert given.x == [(t + s) / 256 for t, s in zip(tokens, source, strict=True)]
    assert source[0] > 0
    assert [list(curve.y) for curve in (given, recovered)] == [
        [measured.shared_psnr[number] for measured in found.measured] for number in (0, 1)
    ]
    labels = [*(f"{name}, with header" for name in file_formats()), "components"]
    assert [curve.label for curve in files] == labels


def test_without_matplotlib_the_numbers_are_written_after_one_warning(
    tmp_path, folder, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = evaluate_reconstruction(settings(folder, tmp_path))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert not (tmp_path / "rate_distortion.png").exists()
    (warning,) = caplog.messages
    assert warning.startswith(f"everything but {tmp_path}/rate_distortion.png is written: ")


def test_the_record_says_all_that_the_numbers_depend_on(tmp_path, folder):
    path = write_reference(folder, tmp_path / "reference.npz", "reconstruction")
    evaluate_reconstruction(settings(folder, tmp_path, reference=path))
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert_declared(record, ReconstructionRecord)
    rows, below = table_of(tmp_path, "reconstruction", reconstruction=tmp_path / "evaluation.json")
    assert [row["K"] for row in rows] == ["8"]
    assert f"images {record['data']['num_images']}; of `images`; side in pixels 16" in below
    assert record["environment"].keys() == environment(torch.device("cpu")).keys()
    assert {"python", "torch", "mergevq", "git_commit"} <= record["environment"].keys()
    assert record["environment"]["torch"] == torch.__version__
    assert record["data"]["num_images"] == 7
    for digest in (
        record["model"]["hash"],
        record["data"]["pixels_sha256"],
        record["extractor"]["sha256"],
        record["reference"]["sha256"],
    ):
        assert len(digest) == 64
    assert record["settings"]["subject"]["batch_size"] == 4
    assert record["lpips"] is None
    (result,) = record["results"]
    assert result["bits"]["per_pixel"] == pytest.approx(result["bits"]["total"] / 256)
    assert result["bits"]["per_pixel_recovered"] == pytest.approx(result["bits"]["tokens"] / 256)
    assert (
        set(result["given"]["metrics"])
        == set(result["recovered"]["metrics"])
        == {*("psnr", "ssim", "l1", "num_exact", "feature_cosine_colours", "frechet_colours")}
    )
    assert len(result["codebook"]["bit_probs"]) == 4
    formats = list(file_formats())
    assert list(dict.fromkeys(file["file_format"] for file in record["baselines"])) == formats
    del result["bits"]["total"]
    result["worst"][0]["psnr"] = 1.0
    record["model"]["config"]["quantizer"]["num_bits"] = "4"
    assert sorted(problems(record, ReconstructionRecord)) == [
        "record.model.config.quantizer.num_bits is '4'",
        "record.results[0].bits.total is missing",
        "record.results[0].worst[0].psnr is not declared",
    ]


def test_an_earlier_evaluation_is_not_overwritten(tmp_path, folder):
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="choose another directory"):
        evaluate_reconstruction(settings(folder, tmp_path))


def test_few_images_give_a_warning(tmp_path, folder):
    with pytest.warns(UserWarning, match="of 7 samples is biased upwards; use at least 2048"):
        evaluate_reconstruction(settings(folder, tmp_path))


# ------------------------------------------------------------------------------ what is refused


def test_a_reference_of_the_same_images_gives_the_same_numbers(tmp_path, folder):
    path = write_reference(folder, tmp_path / "reference.npz", "reconstruction")
    own = evaluate_reconstruction(settings(folder, tmp_path / "own"))
    given = evaluate_reconstruction(settings(folder, tmp_path / "given", reference=path))
    assert given["results"][0]["given"] == own["results"][0]["given"]
    assert given["reference"]["pixels_sha256"] == own["data"]["pixels_sha256"]


def test_a_reference_for_generation_is_refused_and_the_right_one_named(tmp_path, folder):
    path = write_reference(folder, tmp_path / "reference.npz", "generation")
    with pytest.raises(ValueError, match=r"is for generation.*--kind reconstruction --data"):
        evaluate_reconstruction(settings(folder, tmp_path / "out", reference=path))


def test_a_reference_of_other_images_is_refused(tmp_path, folder):
    path = write_reference(folder, tmp_path / "reference.npz", "reconstruction", data="others")
    with pytest.raises(ValueError, match=r"of other images \(7 of"):
        evaluate_reconstruction(settings(folder, tmp_path / "out", reference=path))


def test_another_resolution_is_refused_with_both_numbers(tmp_path, folder):
    path = write_reference(folder, tmp_path / "ref.npz", "reconstruction", image_size=32)
    with pytest.raises(ValueError, match=r"is of 32 x 32 pixels.*16 x 16"):
        evaluate_reconstruction(settings(folder, tmp_path / "out", reference=path))
    with pytest.raises(ValueError, match=r"image_size \(128\) must be the 16 pixels"):
        evaluate_reconstruction(settings(folder, tmp_path / "out", image_size=128))


def test_pictures_larger_than_asked_for_are_not_read(tmp_path, folder):
    images = write_images(tmp_path / "images", 2)
    write_images(tmp_path / "large", 1, size=20)
    (tmp_path / "large/000.png").rename(images / "large.png")
    changes = {"data": str(images), "max_images": None, "max_pixels": 256}
    record = evaluate_reconstruction(settings(folder, tmp_path / "out", **changes))
    assert (record["data"]["num_images"], record["data"]["num_unreadable"]) == (2, 1)
    with pytest.raises(ValueError, match=r"256 pixels, more than max_pixels \(255\)"):
        evaluate_reconstruction(
            settings(folder, tmp_path / "none", **changes | {"max_pixels": 255})
        )


def test_enlarged_images_give_a_warning(tmp_path, folder):
    small = write_images(tmp_path / "small", 3, size=8)
    with pytest.warns(UserWarning, match="8 x 8 pixels and is enlarged to 16 x 16"):
        evaluate_reconstruction(settings(folder, tmp_path / "out", data=str(small)))


# ------------------------------------------------------------------------------------- ranks

TWO_RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
from mergevq.config.evaluation import ReconstructionSettings, RobustnessSettings, Subject
from mergevq.evaluate.reconstruction import evaluate_reconstruction
from mergevq.evaluate.robustness.run import evaluate_robustness
folder, out, batch_size = sys.argv[1:]
subject = Subject(model=f"{folder}/model", data=f"{folder}/images", device="cpu",
                  batch_size=int(batch_size), extractor=f"{folder}/colours.pt", num_workers=0,
                  precision="float32")
evaluate_reconstruction(ReconstructionSettings(
    subject=subject, out=f"{out}/reconstruction", num_kept=(8, 16), num_baseline_images=3))
evaluate_robustness(RobustnessSettings(
    subject=subject, out=f"{out}/robustness", map_fractions=(0.0, 0.5), joint=True))
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path, folder):
    script = tmp_path / "run.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Two images at a time on every rank: another number would change last bits, so some pixels.
    for name, launcher, batch_size in (("one", [], "2"), ("two", torchrun, "4")):
        arguments = [str(folder), str(tmp_path / name), batch_size]
        command = [sys.executable, *launcher, str(script), *arguments]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    for kind in ("reconstruction", "robustness"):
        first, second = (
            json.loads((tmp_path / name / kind / "evaluation.json").read_text())
            for name in ("one", "two")
        )
        assert first["data"] == second["data"]
        assert (first["world_size"], second["world_size"]) == (1, 2)
        for one, two in zip(first["results"], second["results"], strict=True):
            assert one.keys() == two.keys()
            if kind == "robustness":
                assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-9)
                assert one["num_moved"] == two["num_moved"]
                continue
            for source in ("given", "recovered"):
                assert one[source]["metrics"] == pytest.approx(two[source]["metrics"], rel=1e-9)
            assert one["codebook"] == two["codebook"]
            assert [row["image"] for row in one["worst"]] == [row["image"] for row in two["worst"]]
        if kind == "reconstruction":
            assert first["baselines"] == second["baselines"]
