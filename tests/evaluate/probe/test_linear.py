"""Probes: hand-computed votes, separable and random classes, and what may see what."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mergevq.config.probing import FeatureConfig, KnnConfig, LinearConfig
from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.evaluate.probe.linear import (
    Labelled,
    LinearResult,
    RateResult,
    accuracy,
    confusion_matrix,
    held_out,
    linear_probe,
    linear_steps,
    probe_rows,
    standardize,
)
from mergevq.runtime.logs import Progress
from tests.support.probes import tiny_tokenizer, write_colours

QUICK = LinearConfig(rates=(1e-3, 1e-1), num_epochs=8)


def clusters(generator, count=150, spread=1.0, offset=0.0):
    """Three classes around three corners, at unlike scales per channel."""
    label = torch.arange(count) % 3
    values = 8 * functional.one_hot(label, 6).float()
    values = values + spread * torch.randn(count, 6, generator=generator)
    return Labelled(values * torch.tensor([1e-4, 1, 1e3, 1, 1, 1]) + offset, label)


# --------------------------------------------------------------------------------------- linear


def test_separable_classes_are_told_apart(generator):
    train, val = clusters(generator), clusters(generator)
    found = linear_probe(train, val, 3, QUICK)
    assert accuracy(found.scores, val.label) > 0.95


def test_all_images_at_once_are_a_batch_too(generator):
    train, val = clusters(generator), clusters(generator)
    config = LinearConfig(rates=(1e-1,), num_epochs=30, batch_size=None)
    assert accuracy(linear_probe(train, val, 3, config).scores, val.label) > 0.95


def test_epochs_learn_from_crops_in_turn(generator):
    train, val = clusters(generator, spread=9.0), clusters(generator)
    plain = linear_probe(train, val, 3, QUICK)
    # The images themselves as their only crop change nothing, nor do they twice.
    for crops in ([train.values], [train.values] * 2):
        assert torch.equal(linear_probe(train, val, 3, QUICK, crops=crops).scores, plain.scores)
    others = [clusters(generator, spread=9.0).values for _ in range(2)]
    found = [
        linear_probe(train, val, 3, QUICK, crops=crops).scores
        for crops in ([others[0]], [others[1]], others)
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([plain.scores, *found], 2))
    # With one epoch only the first crop is learnt from.
    once = replace(QUICK, num_epochs=1)
    first, both = (linear_probe(train, val, 3, once, crops=c).scores for c in (others[:1], others))
    assert torch.equal(first, both)


def test_random_classes_are_guessed(generator):
    train, val = (torch.randn(400, 8, generator=generator) for _ in range(2))
    label = torch.randint(4, (400,), generator=generator)
    other = torch.randint(4, (400,), generator=generator)
    found = linear_probe(Labelled(train, label), Labelled(val, other), 4, QUICK)
    assert abs(accuracy(found.scores, other) - 0.25) < 0.1
    assert abs(found.sweep[found.chosen].held_out_accuracy - 0.25) < 0.15


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(generator):
    train, val = clusters(generator, spread=9.0), clusters(generator)
    first, again, other = (linear_probe(train, val, 3, QUICK, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.scores, again.scores)
    assert first.sweep == again.sweep
    assert not torch.equal(first.scores, other.scores)


def test_the_images_that_are_classified_have_no_say_in_the_rate(generator):
    train, val = clusters(generator), clusters(generator)
    wrong = Labelled(val.values, (val.label + 1) % 3)
    right, misled = (linear_probe(train, each, 3, QUICK) for each in (val, wrong))
    assert right.chosen == misled.chosen
    assert torch.equal(right.scores, misled.scores)
    held = [result.held_out_accuracy for result in right.sweep]
    assert held == [result.held_out_accuracy for result in misled.sweep]
    assert right.sweep[0].accuracy != misled.sweep[0].accuracy


def test_every_rate_is_trained_as_if_it_were_alone(generator):
    train, val = clusters(generator), clusters(generator)
    together = linear_probe(train, val, 3, QUICK).sweep
    for number, rate in enumerate(QUICK.rates):
        alone = linear_probe(train, val, 3, LinearConfig(rates=(rate,), num_epochs=8))
        assert alone.sweep == (together[number],)


def test_the_scale_and_place_of_features_do_not_matter(generator):
    train, val = clusters(generator), clusters(generator)
    moved = [Labelled(4 * each.values, each.label) for each in (train, val)]
    plain, scaled = linear_probe(train, val, 3, QUICK), linear_probe(*moved, 3, QUICK)
    assert torch.equal(plain.scores, scaled.scores)


def test_standardized_channels_have_mean_0_and_deviation_1_and_constant_ones_are_0():
    train = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert standardize(train, train).tolist() == [[-1, 0], [1, 0]]
    assert standardize(train, torch.tensor([[4.0, 6.0]])).tolist() == [[2, 0]]


def test_a_part_of_each_class_is_held_out(generator):
    label = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    chosen = held_out(label, 0.2, generator)
    assert label[chosen].bincount(minlength=4).tolist() == [2, 1, 1, 0]
    with pytest.raises(ValueError, match="one training image"):
        held_out(torch.arange(4), 0.2, generator)


def test_steps_are_counted_as_they_are_taken(generator):
    train = clusters(generator, count=30)
    progress = Progress(10**6)
    linear_probe(train, train, 3, QUICK, progress=progress)
    # 30 images in 8 batches, and the 24 that are not held out in 8.
    assert progress.done == linear_steps(train.label, QUICK) == 8 * (8 + 8)


def test_the_edge_of_a_sweep_is_noticed_unless_another_rate_is_as_good():
    def result(*held):
        rates = [RateResult(10.0**number, share, 0.5) for number, share in enumerate(held)]
        return LinearResult(tuple(rates), held.index(max(held)), torch.zeros(1, 2))

    assert result(0.9, 0.8, 0.7).at_edge
    assert result(0.7, 0.8, 0.9).at_edge
    assert not result(0.7, 0.9, 0.8).at_edge
    assert not result(0.9, 0.9, 0.8).at_edge


# --------------------------------------------------------------------------------------- scores


def test_accuracy_counts_the_best_and_skips_classes_without_votes():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, -torch.inf, -torch.inf]])
    label = torch.tensor([0, 1, 2])
    assert accuracy(scores, label) == pytest.approx(1 / 3)
    assert accuracy(scores, label, top=2) == pytest.approx(2 / 3)
    assert accuracy(scores, label, top=5) == pytest.approx(2 / 3)


def test_rows_of_a_confusion_matrix_sum_to_the_images_of_a_class():
    label, predicted = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    matrix = confusion_matrix(label, predicted, 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert torch.equal(matrix.sum(1), label.bincount(minlength=3))


# ------------------------------------------------------------------------------------ comparison


def test_tokens_are_compared_with_pixels_and_their_components(tmp_path, capsys):
    train, val = (
        list(
            eval_batches(
                open_images(str(write_colours(tmp_path / name, count, seed=count))),
                image_size=16,
                batch_size=8,
                num_workers=0,
            )
        )
        for name, count in (("train", 10), ("val", 4))
    )
    model = tiny_tokenizer()
    settings = {
        "features": FeatureConfig(pools=("mean",)),
        "linear": LinearConfig(rates=(1e-1,), num_epochs=12, batch_size=None),
        "knn": KnnConfig(num_neighbours=(5,)),
    }
    rows = probe_rows(model, train, val, (9,), **settings)
    shown = capsys.readouterr().err
    assert "image 42/42, " in shown
    # Of 30 images 24 choose the rate, then all are learned from: 12 epochs each, 6 features.
    assert f"probe step {12 * 2 * 6}/{12 * 2 * 6}, " in shown
    assert [(row.name, row.dim) for row in rows] == [
        ("9 tokens, merged, mean", 16),
        ("9 tokens, quantized, mean", 6),
        ("64 tokens (no merging), mean", 16),
        ("64 tokens (no merging), quantized, mean", 6),
        ("raw pixels", 768),
        ("PCA of pixels, 16 components", 16),
    ]
    assert rows == probe_rows(model, train, val, (9,), **settings)
    assert min(row.linear_accuracy for row in rows[-2:]) > 0.95
    assert min(row.knn_accuracy for row in rows[-2:]) > 0.95
    unlabelled = [batch._replace(label=-torch.ones_like(batch.label)) for batch in train]
    with pytest.raises(ValueError, match="30 of 30 images of the training data have no label"):
        probe_rows(model, unlabelled, val, (9,), **settings)
