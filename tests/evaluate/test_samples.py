"""Tests of `mergevq.evaluate.samples`."""

import pytest
import torch

from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.samples import sample_missing
from mergevq.runtime import distributed
from tests.support.evaluate_generation import files, sample_run, settings
from tests.support.evaluations import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:.*images are not as many of each:UserWarning")

# ---------------------------------------------------------------------------------- sampling


def test_samples_are_the_same_on_any_ranks_and_after_a_stop(tmp_path, sampled_folder, pair):
    run = sample_run(sampled_folder)
    sample_missing(pair, run, tmp_path / "one", ALONE)
    expected = files(tmp_path / "one")
    assert sorted(expected) == [f"{number:08d}.png" for number in range(7)]
    for rank in (1, 0):
        world = distributed.World(rank=rank, world_size=2, local_rank=0, device=torch.device("cpu"))
        sample_missing(pair, run, tmp_path / "two", world)
    assert files(tmp_path / "two") == expected
    for name in ("00000001.png", "00000006.png"):
        (tmp_path / "one" / "samples" / name).unlink()
    sample_missing(pair, run, tmp_path / "one", ALONE)
    assert files(tmp_path / "one") == expected


def test_more_samples_and_other_batches_change_none_that_are_there(tmp_path, sampled_folder, pair):
    sample_missing(pair, sample_run(sampled_folder, num_images=4), tmp_path / "some", ALONE)
    sample_missing(pair, sample_run(sampled_folder), tmp_path / "some", ALONE)
    sample_missing(pair, sample_run(sampled_folder, batch_size=7), tmp_path / "all", ALONE)
    assert files(tmp_path / "some") == files(tmp_path / "all")


def test_what_is_there_is_not_made_again(tmp_path, sampled_folder, pair):
    sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
    marked = tmp_path / "samples" / "00000002.png"
    marked.write_bytes(b"mark")
    sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
    assert marked.read_bytes() == b"mark"
    with pytest.raises(ValueError, match=r"00000002.png is not the picture that was made"):
        evaluate_generation(settings(sampled_folder, tmp_path, run=sample_run(sampled_folder)))


def test_a_picture_that_no_process_wrote_down_is_made_again(tmp_path, sampled_folder, pair):
    sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
    expected = files(tmp_path)
    sums = tmp_path / "samples/SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[:-2]) + lines[-1][:50])
    for name in ("00000005.png", "00000006.png"):
        (tmp_path / "samples" / name).write_bytes(b"foreign")
    sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
    assert files(tmp_path) == expected
    assert sorted(set(lines)) == sorted(
        {*sums.read_text().splitlines(keepends=True)} - {lines[-1][:50] + "\n"}
    )


def test_samples_of_another_run_are_refused(tmp_path, sampled_folder, pair):
    sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
    with pytest.raises(ValueError, match=r"samples of another run, .* seed \(0, now 1\)"):
        sample_missing(pair, sample_run(sampled_folder, seed=1), tmp_path, ALONE)
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(ValueError, match="images of unknown origin"):
        sample_missing(pair, sample_run(sampled_folder), tmp_path, ALONE)
