"""Merging: schedules, matching, source maps and their cost."""

import itertools
import math

import pytest
import torch

from mergevq.tokenizer.reducers.matching import (
    centres,
    distance,
    match,
    merge_schedule,
    merge_step,
)
from tests.support import reference

# (L, K): tokens merged by each of twelve layers of the authors' encoder.
AUTHORS_SCHEDULES = {
    (256, 225): [4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2],
    (256, 196): [12, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3],
    (256, 169): [8, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4],
    (256, 144): [12, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 5],
    (256, 121): [14, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6],
    (256, 100): [24, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7],
    (256, 81): [22, 20, 19, 18, 16, 15, 14, 13, 11, 10, 9, 8],
    (256, 64): [29, 22, 21, 19, 18, 16, 15, 13, 12, 10, 9, 8],
    (256, 49): [23, 25, 23, 22, 20, 18, 17, 15, 13, 12, 10, 9],
    (256, 36): [25, 26, 24, 23, 21, 19, 18, 16, 14, 13, 11, 10],
    (1024, 576): [54, 53, 50, 46, 43, 39, 36, 32, 29, 25, 22, 19],
    (1024, 400): [83, 73, 68, 63, 59, 54, 49, 44, 40, 35, 30, 26],
    (1024, 256): [101, 90, 84, 78, 72, 66, 61, 55, 49, 43, 37, 32],
    (1024, 225): [95, 94, 88, 82, 76, 70, 64, 58, 52, 46, 40, 34],
    (1024, 196): [108, 96, 90, 84, 78, 72, 65, 59, 53, 47, 41, 35],
}
SHAPES = ["linear", "square", "constant"]


def remaining(num_tokens, counts):
    return list(itertools.accumulate(counts, lambda left, count: left - count, initial=num_tokens))


# ---------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("sizes", "counts"), AUTHORS_SCHEDULES.items())
def test_the_linear_schedule_is_the_authors_list(sizes, counts):
    assert merge_schedule(*sizes, num_layers=12) == counts


@pytest.mark.parametrize("num_layers", [2, 3, 12])
def test_the_linear_schedule_follows_the_authors_rule_wherever_it_can(num_layers):
    # Down to half of the tokens it asks no layer for more than half of what is left. Where its
    # correction makes the first count negative, no model can follow it.
    theirs = {kept: reference.linear_schedule(64 - kept, num_layers) for kept in range(32, 65)}
    possible = {kept: counts for kept, counts in theirs.items() if counts[0] >= 0}
    assert len(possible) >= 25
    assert {kept: merge_schedule(64, kept, num_layers) for kept in possible} == possible


def test_the_square_schedule_decreases_with_the_square():
    # Layers weigh 9, 4, 1 of the 28 tokens to merge.
    assert merge_schedule(100, 72, num_layers=3, shape="square") == [18, 8, 2]


def test_the_constant_schedule_is_even():
    assert merge_schedule(100, 88, num_layers=4, shape="constant") == [3, 3, 3, 3]
    assert sorted(merge_schedule(100, 90, num_layers=4, shape="constant")) == [2, 2, 3, 3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 49, 120])
def test_every_number_of_tokens_that_halving_reaches_is_reached_exactly(
    num_tokens, num_layers, shape
):
    for num_kept in range(math.ceil(num_tokens / 2**num_layers), num_tokens + 1):
        counts = merge_schedule(num_tokens, num_kept, num_layers, shape)
        left = remaining(num_tokens, counts)
        assert len(counts) == num_layers
        assert left[-1] == num_kept
        assert all(0 <= count <= before // 2 for before, count in zip(left, counts, strict=False))


@pytest.mark.parametrize("num_kept", [36, 64, 100, 144, 196, 256, 400, 576, 1024])
def test_no_number_of_kept_tokens_is_silently_another(num_kept):
    left = remaining(1024, merge_schedule(1024, num_kept, num_layers=12))
    assert left[-1] == num_kept


@pytest.mark.parametrize("shape", SHAPES)
def test_a_steep_schedule_is_held_to_halves(shape):
    assert merge_schedule(256, 16, num_layers=4, shape=shape) == [128, 64, 32, 16]
    assert merge_schedule(15, 1, num_layers=4, shape=shape) == [7, 4, 2, 1]


def test_a_number_of_tokens_too_few_for_the_layers_is_an_error_that_names_the_least():
    with pytest.raises(ValueError, match=r"num_kept \(15\) must be at least 16: each of 4 layers"):
        merge_schedule(256, 15, num_layers=4)


@pytest.mark.parametrize("num_kept", [-1, 0, 65])
def test_a_number_of_tokens_that_the_grid_has_not_is_an_error(num_kept):
    with pytest.raises(ValueError, match=rf"num_kept \({num_kept}\) must be between 1 and the 64"):
        merge_schedule(64, num_kept, num_layers=12)


# ----------------------------------------------------------------------------------- matching


def test_the_most_similar_pairs_are_merged():
    # Destinations 0, 2, 4 look along x, y and -x. Of the candidates, 1 is near x, 3 is between
    # all of them, 5 is nearest of all to its destination, -x.
    keys = torch.tensor([[1, 0], [9, 2], [0, 1], [5, -6], [-1, 0], [-99, 1.0]])[None]
    assert match(keys, 0).tolist() == [[3, 0, 4, 1, 5, 2]]
    assert match(keys, 1).tolist() == [[2, 0, 3, 1, 4, 4]]
    assert match(keys, 2).tolist() == [[1, 1, 2, 0, 3, 3]]
    assert match(keys, 3).tolist() == [[0, 0, 1, 0, 2, 2]]


def test_similarity_does_not_depend_on_the_length_of_keys():
    keys = torch.randn(2, 20, 4)
    lengths = torch.rand(2, 20, 1) * 100 + 0.01
    assert torch.equal(match(keys, 6), match(keys * lengths, 6))


def test_equal_similarities_go_to_the_first():
    # Candidates 1 and 3 join, both destination 0; 5 stays and comes first.
    assert match(torch.ones(1, 6, 3), 2).tolist() == [[1, 1, 2, 1, 3, 0]]
    # Sorts that keep no order begin to show with more numbers.
    candidates = match(torch.ones(2, 4000, 1), 700)[:, 1::2]
    expected = torch.cat([torch.full((700,), 1300), torch.arange(1300)])
    assert torch.equal(candidates, expected.expand(2, -1))


@pytest.mark.parametrize("num_tokens", [2, 3, 16, 31, 64])
def test_matching_follows_the_plain_definition(num_tokens):
    keys = torch.randn(num_tokens, 6)
    for num_merged in {0, 1, num_tokens // 3, num_tokens // 2}:
        step = reference.step_matrix(reference.matching(keys, num_merged))
        assert match(keys[None], num_merged)[0].tolist() == step.argmax(0).tolist()


def test_distance_counts_against_similarity():
    # All keys are equal. Candidate 1 is 3 from destination 0 and 5 from 2; candidate 3 is 1 from 2.
    places = torch.tensor([[0, 0], [0, 3], [4, 0], [3, 0.0]])[None]
    torch.testing.assert_close(distance(places)[0], torch.tensor([[3, 5], [3, 1.0]]))
    assert match(torch.ones(1, 4, 2), 1, places).tolist() == [[1, 0, 2, 2]]
    assert match(torch.ones(1, 4, 2), 2, places).tolist() == [[0, 0, 1, 1]]
    # So far away that no place counts, keys decide.
    keys = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0.0]])[None]
    assert match(keys, 2, 1e-3 * places).tolist() == [[0, 1, 1, 0]]


def test_the_centre_of_a_token_is_the_mean_of_its_cells():
    # 0 0 1
    # 2 0 1
    index = torch.tensor([[0, 0, 1, 2, 0, 1]])
    found = centres(index, 3, 3)[0]
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 2 / 3], [0.5, 2], [1, 0]]))


def test_a_batch_is_matched_as_each_image_alone():
    keys = torch.randn(5, 64, 16)
    # Two images full of ties.
    keys[3] = 1.0
    keys[4] = keys[4, :4].repeat(16, 1)
    together = match(keys, 20)
    alone = [match(image[None], 20) for image in keys]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("num_merged", [-1, 4])
def test_merging_more_than_half_in_one_step_is_an_error(num_merged):
    with pytest.raises(ValueError, match=rf"num_merged \({num_merged}\) .* half of the 7 tokens"):
        match(torch.randn(1, 7, 4), num_merged)


def test_matching_is_in_full_precision_under_autocast():
    # bfloat16 has no number between 1 and 1.0078, so it could not tell the candidates apart.
    keys = torch.tensor([[1, 0], [1, 0.004], [0, 1], [1, 0.001]])[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert match(keys, 1).tolist() == [[1, 0, 2, 1]]


def test_matching_has_no_gradient():
    keys = torch.randn(1, 8, 4, requires_grad=True)
    assert not match(keys, 2).requires_grad


# ------------------------------------------------------------------------ steps and the source


def test_a_step_takes_means_weighted_by_size():
    tokens, sizes = torch.tensor([[[1.0], [4.0], [7.0]]]), torch.tensor([[1.0, 2.0, 5.0]])
    merged = merge_step(tokens, sizes, torch.tensor([[1, 1, 0]]), 2)
    assert merged.tokens.tolist() == [[[7.0], [3.0]]]
    assert merged.sizes.tolist() == [[5.0, 3.0]]


def test_steps_compose_to_the_papers_dense_source_matrix():
    num_tokens, counts = 36, (12, 9, 5)
    grid = torch.randn(2, num_tokens, 4)
    tokens, sizes = grid, torch.ones(2, num_tokens)
    index = torch.arange(num_tokens).expand(2, -1)
    matrices = [torch.eye(num_tokens), torch.eye(num_tokens)]
    for count in counts:
        keys = torch.randn(2, tokens.shape[1], 8)
        destination = match(keys, count)
        tokens, sizes = merge_step(tokens, sizes, destination, tokens.shape[1] - count)
        index = destination.gather(1, index)
        groups = [reference.matching(image, count) for image in keys]
        matrices = [
            reference.compose(reference.step_matrix(members), matrix)
            for members, matrix in zip(groups, matrices, strict=True)
        ]
    for image, matrix in enumerate(matrices):
        assert torch.equal(reference.source_matrix(index[image], tokens.shape[1]), matrix)
        assert torch.equal(sizes[image], matrix.sum(1))
        means = matrix @ grid[image] / matrix.sum(1, keepdim=True)
        torch.testing.assert_close(tokens[image], means)


def test_gradients_of_a_step_are_those_of_its_values_and_have_gradients_themselves():
    sizes = torch.tensor([[1.0, 2, 5, 1, 1], [3, 1, 1, 1, 2]], dtype=torch.float64)
    destination = torch.tensor([[2, 0, 2, 1, 2], [1, 1, 0, 2, 0]])
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def step(tokens):
        return merge_step(tokens, sizes, destination, 3).tokens

    assert torch.autograd.gradcheck(step, tokens)
    assert torch.autograd.gradgradcheck(step, tokens)
