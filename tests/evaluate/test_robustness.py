"""Nothing replaced is the reconstruction; what is replaced stays within the ball."""

import json
import sys

import pytest
import torch

from mergevq.config.evaluation import RobustnessSettings, Subject
from mergevq.config.records import RobustnessRecord
from mergevq.evaluate.reconstruction import measure_reconstructions
from mergevq.evaluate.robustness import (
    Point,
    default_radii,
    draw_flips,
    evaluate_robustness,
    mean_distance,
    measure_robustness,
    perturb,
)
from mergevq.tokenizer.bits import codes_to_indices
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import subject_of, write_images, write_network, write_tokenizer
from tests.support.records import assert_declared

pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    write_images(folder / "images", 5)
    write_network(folder / "colours.pt")
    write_tokenizer(folder / "model")
    return folder


@pytest.fixture
def subject(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    return subject_of(tokenizer, folder / "images", folder / "colours.pt", batch_size=2)


def test_a_fraction_of_zero_is_the_reconstruction_to_the_last_digit(subject):
    (found,) = measure_reconstructions(subject, [8]).measured
    curves = measure_robustness(subject, 8, [0.0, 1.0], radii=[2, 1], seed=0)
    assert curves.points[0].numbers == found.outcome.given
    assert [point.radius for point in curves.points] == [None, 1, 2]
    assert found.outcome.given not in [point.numbers for point in curves.points[1:]]
    assert curves.num_images == 5


def test_wrong_tokens_change_the_image_more_the_more_there_are(subject):
    # Against the reconstruction without errors, which is what errors take away from.
    batch = next(subject.batches())
    encoded = subject.tokenizer.encode(batch.image, 8)
    flips = draw_flips(8, 4, 2, 0, [0, 1])
    with torch.no_grad():
        images = [
            subject.tokenizer.decode(perturb(encoded.codes, flips, count), encoded.source)
            for count in (0, 2, 8)
        ]
    few, many = ((image - images[0]).abs().mean() for image in images[1:])
    assert 0 < few < many


def test_two_curves_agree_to_the_last_digit_and_another_seed_does_not(subject):
    first, second, other = (
        measure_robustness(subject, 8, [0.5], radii=[2], seed=seed).points for seed in (0, 0, 1)
    )
    assert first == second != other


def test_draws_of_an_image_do_not_depend_on_its_batch():
    together, alone = draw_flips(8, 6, 3, 0, [4, 7]), draw_flips(8, 6, 3, 0, [7])
    assert torch.equal(together.rank[1], alone.rank[0])
    assert torch.equal(together.bits[1], alone.bits[0])


def test_replacements_are_uniform_in_the_ball_without_its_centre():
    flips = draw_flips(500, 4, 2, 0, list(range(20)))
    codes = -torch.ones(20, 500, 4)
    indices = codes_to_indices(perturb(codes, flips, 500)).flatten()
    # Of 4 bits, 4 codes differ in one and 6 in two.
    counts = indices.bincount(minlength=16)
    ball = [i for i in range(16) if bin(i).count("1") in {1, 2}]
    assert int(counts[ball].sum()) == 10_000
    assert counts[ball].tolist() == pytest.approx([1000] * 10, rel=0.15)


def test_so_many_tokens_are_replaced_and_fewer_are_among_more():
    flips = draw_flips(8, 6, 3, 0, [0, 1, 2])
    codes = torch.ones(3, 8, 6)
    changed = [(perturb(codes, flips, count) != codes).any(-1) for count in (0, 3, 8)]
    assert [mask.sum(1).tolist() for mask in changed] == [[0] * 3, [3] * 3, [8] * 3]
    assert not (changed[1] & ~changed[2]).any()


def test_the_balls_are_those_of_the_papers_numbers():
    # 12,615 of 262,144 codes differ in up to 5 of 18 bits: less than 200 of 4,096.
    assert default_radii(18) == [6, 6, 6]
    # Of 12 bits, 298 codes differ in up to 3, and 200/4096 and 280/4096 of all are fewer.
    assert default_radii(12) == [3, 3, 4]
    assert default_radii(1) == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": [0]}, r"radius \(0\) must be between 1 and the 4 bits"),
        ({"radii": [1, 5]}, r"radius \(5\) must be between 1 and the 4 bits"),
        ({"num_kept": 17}, "17"),
    ],
)
def test_what_cannot_be_is_refused(subject, change, message):
    given = {"num_kept": 8, "fractions": [0.5], "radii": [1], "seed": 0}
    with pytest.raises(ValueError, match=message):
        measure_robustness(subject, **given | change)


def test_the_mean_is_over_the_papers_fractions_and_balls():
    # Of 12 bits the balls of 200 and 280 neighbours are one, which counts twice.
    points = [
        Point(
            fraction, radius, 1, {"psnr": 0.0, "frechet_net": 10 * fraction + 100 * (radius == 4)}
        )
        for fraction in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
        for radius in (3, 4)
    ]
    assert mean_distance(points, 12) == {"perturbed_frechet_net": pytest.approx(7 + 100 / 3)}
    inception = [point._replace(numbers={"fid": 2.0}) for point in points]
    assert mean_distance(inception, 12) == {"perturbed_fid": pytest.approx(2)}


def settings_of(folder, out, *, extractor=True, **changes):
    subject = Subject(
        model=str(folder / "model"),
        data=str(folder / "images"),
        extractor=str(folder / "colours.pt") if extractor else None,
        device="cpu",
        batch_size=4,
        num_workers=0,
    )
    return RobustnessSettings(subject=subject, out=str(out), **changes)


def test_the_curve_is_written_and_drawn(tmp_path, folder):
    evaluate_robustness(settings_of(folder, tmp_path))
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert_declared(record, RobustnessRecord)
    fractions = [0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [result["fraction"] for result in record["results"]] == fractions
    assert [result["num_replaced"] for result in record["results"]] == [0, 1, 2, 4, 5, 6, 6, 7]
    assert record["balls"] == [{"radius": 1, "share": 0.25, "neighbours": [200, 280, 360]}]
    averaged = [result["metrics"]["frechet_colours"] for result in record["results"][3:]]
    assert record["metrics"] == {"perturbed_frechet_colours": pytest.approx(sum(averaged) / 5)}
    assert record["left_out"] == []
    assert len(record["model"]["hash"]) == len(record["data"]["pixels_sha256"]) == 64
    assert (tmp_path / "robustness.png").is_file()


def test_without_matplotlib_the_numbers_are_written_after_one_warning(
    tmp_path, folder, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = evaluate_robustness(settings_of(folder, tmp_path))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert not (tmp_path / "robustness.png").exists()
    (warning,) = caplog.messages
    assert warning.startswith(f"everything but {tmp_path}/robustness.png is written: ")


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"extractor": False}, "--extractor"),
        ({"radius": 2}, "leave --radius out"),
        ({"fractions": (0.9, 0.0, 0.5)}, "--fractions 0.5,0.6,0.7,0.8,0.9"),
    ],
)
def test_the_mean_is_left_out_where_it_would_be_of_something_else(
    tmp_path, folder, changes, needed
):
    record = evaluate_robustness(settings_of(folder, tmp_path, **changes))
    assert record["metrics"] == {}
    (text,) = record["left_out"]
    assert needed in text
