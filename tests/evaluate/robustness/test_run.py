"""Nothing replaced is the reconstruction; what is replaced stays within the ball."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from mergevq.cli.tables import robustness_table
from mergevq.config.evaluation import RobustnessSettings, Subject
from mergevq.config.parts.reducers import Pool
from mergevq.config.records import RobustnessRecord
from mergevq.evaluate.reconstruction import measure_reconstructions
from mergevq.evaluate.robustness.maps import move_cells
from mergevq.evaluate.robustness.run import (
    Point,
    Wrong,
    default_radii,
    draw_flips,
    evaluate_robustness,
    mean_distance,
    mean_map_distances,
    measure_robustness,
    mistakes,
    perturb,
)
from mergevq.metrics.image import psnr
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.bits import codes_to_indices
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import (
    CONFIG,
    subject_of,
    write_images,
    write_network,
    write_tokenizer,
)
from tests.support.records import assert_declared

PLAIN = Wrong(0.0, None)
WRONG = [Wrong(0.5, 2), Wrong(0.0, None, "given", 0.5, "random")]
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
    curves = measure_robustness(subject, 8, [PLAIN, Wrong(1.0, 1), Wrong(1.0, 2)], seed=0)
    assert curves.points[0].numbers == found.outcome.given
    assert found.outcome.given not in [point.numbers for point in curves.points[1:]]
    assert curves.num_images == 5


def test_no_moved_cell_is_the_reconstruction_by_the_given_and_by_the_recovered_map(subject):
    subject = subject._replace(extractor=None)
    (found,) = measure_reconstructions(subject, [8]).measured
    wrongs = [
        Wrong(0.0, None, source, share, groups)
        for source in ("given", "recovered")
        for share, groups in ((0.0, None), (0.0, "neighbour"), (0.0, "random"), (0.5, "random"))
    ]
    points = measure_robustness(subject, 8, wrongs, seed=0).points
    plain = [found.outcome.given] * 3 + [found.outcome.recovered] * 3
    assert [point.numbers for point in points[:3] + points[4:7]] == plain
    assert plain[0] != plain[3]
    for point, before in ((points[3], plain[0]), (points[7], plain[3])):
        assert point.num_moved == pytest.approx(8, abs=1)
        assert point.numbers != before


def test_tokens_and_cells_that_are_wrong_together_are_those_that_are_wrong_alone(subject):
    joint = Wrong(0.5, 2, "given", 0.5, "neighbour")
    points = measure_robustness(subject, 8, [PLAIN, joint], seed=3).points
    with torch.no_grad():
        (batch,) = subject._replace(subject=replace(subject.subject, batch_size=5)).batches()
        encoded = subject.tokenizer.encode(batch.image, 8)
        ids = list(range(5))
        codes = perturb(encoded.codes, draw_flips(8, 4, 2, 3, ids), 4)
        moved = move_cells(encoded.source, (4, 4), "neighbour", [8], seed=3, image_ids=ids)[8]
        image = subject.tokenizer.decode(take_rows(codes, moved.order), moved.source)
    assert points[1].numbers["psnr"] == pytest.approx(
        float(psnr(batch.image, image).mean()), abs=1e-3
    )
    # The map alone, with the tokens in its order, is what unmerging gives cell by cell.
    order = moved.order.gather(1, moved.source.index)
    assert (order != encoded.source.index).sum(1).tolist() == moved.num_moved.tolist()


def test_a_map_recovered_from_wrong_tokens_is_theirs(subject):
    wrong = Wrong(0.5, 2, "recovered")
    (point,) = measure_robustness(subject, 8, [wrong], seed=0).points
    with torch.no_grad():
        (batch,) = subject._replace(subject=replace(subject.subject, batch_size=5)).batches()
        codes = subject.tokenizer.encode(batch.image, 8).codes
        codes = perturb(codes, draw_flips(8, 4, 2, 0, list(range(5))), 4)
        image = subject.tokenizer.decode(codes, subject.tokenizer.recover(codes))
    assert point.numbers["psnr"] == pytest.approx(float(psnr(batch.image, image).mean()), abs=1e-3)


def test_mistakes_are_of_tokens_of_maps_and_of_both(folder, tmp_path):
    changes = {"fractions": (0.5, 0.0), "map_fractions": (0.0, 0.1)}
    alone = mistakes(settings_of(folder, tmp_path, **changes), [2])
    assert alone == [
        PLAIN,
        Wrong(0.5, 2),
        Wrong(0.0, None, "given", 0.1, "neighbour"),
        Wrong(0.0, None, "given", 0.1, "random"),
        Wrong(0.0, None, "recovered"),
        Wrong(0.0, None, "recovered", 0.1, "neighbour"),
        Wrong(0.0, None, "recovered", 0.1, "random"),
    ]
    assert mistakes(settings_of(folder, tmp_path, **changes, joint=True), [2])[7:] == [
        Wrong(0.1, 2, "given", 0.1, "neighbour"),
        Wrong(0.1, 2, "given", 0.1, "random"),
        Wrong(0.1, 2, "recovered"),
    ]
    with pytest.raises(ValueError, match="joint needs shares of the cells"):
        settings_of(folder, tmp_path, joint=True)


def test_maps_that_are_implied_cannot_be_wrong(folder):
    config = replace(CONFIG, reducer=Pool(), num_kept=16)
    pooled = subject_of(Tokenizer(config), folder / "images")
    with pytest.raises(ValueError, match=r"imply it \(model.reducer.kind pool\); leave --map-fr"):
        measure_robustness(pooled, 16, [Wrong(0.0, None, "given", 0.5, "random")], seed=0)


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
        measure_robustness(subject, 8, WRONG, seed=seed).points for seed in (0, 0, 1)
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
        ({"wrongs": [Wrong(0.5, 0)]}, r"radius \(0\) must be between 1 and the 4 bits"),
        ({"wrongs": [*WRONG, Wrong(0.5, 5)]}, r"radius \(5\) must be between 1 and the 4 bits"),
        ({"num_kept": 17}, "17"),
    ],
)
def test_what_cannot_be_is_refused(subject, change, message):
    given = {"num_kept": 8, "wrongs": WRONG, "seed": 0}
    with pytest.raises(ValueError, match=message):
        measure_robustness(subject, **given | change)


def test_the_mean_is_over_the_papers_fractions_and_balls():
    # Of 12 bits the balls of 200 and 280 neighbours are one, which counts twice.
    points = [
        Point(
            Wrong(fraction, radius),
            1,
            0.0,
            {"psnr": 0.0, "frechet_net": 10 * fraction + 100 * (radius == 4)},
        )
        for fraction in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
        for radius in (3, 4)
    ]
    assert mean_distance(points, 12) == {"perturbed_frechet_net": pytest.approx(7 + 100 / 3)}
    inception = [point._replace(numbers={"fid": 2.0}) for point in points]
    assert mean_distance(inception, 12) == {"perturbed_fid": pytest.approx(2)}


def test_means_over_wrong_maps_are_by_map_and_by_groups():
    base = {("given", "neighbour"): 0, ("given", "random"): 100, ("recovered", "neighbour"): 200}
    base |= {("recovered", "random"): 300}
    points = [
        Point(Wrong(0.0, None, *kind[:1], share, kind[1]), 0, 0.0, {"fid": start + 10 * share})
        for kind, start in base.items()
        for share in (0.1, 0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    assert mean_map_distances(points) == {
        f"moved_{groups}_{source}_fid": pytest.approx(start + 7)
        for (source, groups), start in base.items()
    }


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


def test_wrong_maps_are_written_and_drawn(tmp_path, folder):
    changes = {"fractions": (0.0,), "map_fractions": (0.0, 0.5), "joint": True, "radius": 2}
    record = evaluate_robustness(settings_of(folder, tmp_path, **changes))
    assert_declared(json.loads((tmp_path / "evaluation.json").read_text()), RobustnessRecord)
    assert [
        (r["fraction"], r["source"], r["groups"], r["num_moved"]) for r in record["results"]
    ] == [
        (0.0, "given", None, 0.0),
        (0.0, "given", "neighbour", pytest.approx(8, abs=1)),
        (0.0, "given", "random", pytest.approx(8, abs=1)),
        (0.0, "recovered", None, 0.0),
        (0.0, "recovered", "neighbour", pytest.approx(8, abs=1)),
        (0.0, "recovered", "random", pytest.approx(8, abs=1)),
        (0.5, "given", "neighbour", pytest.approx(8, abs=1)),
        (0.5, "given", "random", pytest.approx(8, abs=1)),
        (0.5, "recovered", None, 0.0),
    ]
    text = "the means of the Frechet distances of wrong maps: they need --map-fractions 0.5,0.6"
    assert record["left_out"][1].startswith(text)
    assert (tmp_path / "robustness.png").is_file()
    table = robustness_table(record)
    assert "map     groups  cells" in table


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
