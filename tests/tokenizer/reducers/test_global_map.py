"""Tests of `mergevq.tokenizer.reducers.global_map`."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.parts import GlobalMap as Settings
from mergevq.config.recipes.digits import digits32_global_map
from mergevq.data.layouts import Source, canonicalize, merge, unmerge
from mergevq.nn.blocks import Attention
from mergevq.tokenizer.reducers.global_map import (
    GlobalMap,
    alignment,
    assignment,
    cosines,
    distances_of,
    exploration_noise,
    linkage,
    means_of,
    resized,
    together,
)
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink

SMALL = Settings(num_layers=2, num_heads=2, layer_scale=0.1)
CLASS = torch.zeros(2, 1, 8)


def reducer(settings=SMALL, grid_size=4):
    torch.manual_seed(0)
    return GlobalMap(settings, 8, grid_size)


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_distances(count, seed):
    upper = numbers(count, count, seed=seed).double().triu(1)
    return upper + upper.mT


def test_the_two_nearest_pairs_of_four_cells_join_by_hand():
    distances = torch.ones(4, 4, dtype=torch.float64)
    distances[0, 1] = distances[1, 0] = 0.1
    distances[2, 3] = distances[3, 2] = 0.2
    assert linkage(distances, 2).tolist() == [0, 0, 1, 1]
    assert linkage(distances, 3).tolist() == [0, 0, 1, 2]
    assert linkage(distances, 4).tolist() == [0, 1, 2, 3]
    assert linkage(distances, 1).tolist() == [0, 0, 0, 0]


def by_definition(distances, num_clusters):
    """Clusters whose mean distance over all pairs of their cells is least join."""
    clusters = [[cell] for cell in range(len(distances))]
    while len(clusters) > num_clusters:
        one, other = min(
            itertools.combinations(clusters, 2),
            key=lambda pair: distances[pair[0]][:, pair[1]].mean(),
        )
        clusters.remove(other)
        one.extend(other)
    return sorted(sorted(cluster) for cluster in clusters)


def as_lists(index):
    return [(index == place).nonzero()[:, 0].tolist() for place in range(int(index.max()) + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_linkage_is_its_definition(seed):
    distances = random_distances(9, seed)
    for num_clusters in (1, 2, 4, 8, 9):
        found = linkage(distances, num_clusters)
        assert as_lists(found) == by_definition(distances, num_clusters)
        # The list is sorted by lowest cells.
        index = found[None]
        assert torch.equal(canonicalize(Source(index, num_clusters)).source.index, index)


def test_linkage_is_that_of_scipy():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    for seed in range(50):
        distances = random_distances(16, seed) + 9
        upper = distances[tuple(torch.triu_indices(16, 16, 1))]
        tree = hierarchy.linkage(upper.numpy(), "average")
        for num_clusters in (2, 5, 11):
            theirs = torch.tensor(hierarchy.cut_tree(tree, num_clusters)[:, 0])
            assert torch.equal(linkage(distances, num_clusters), theirs)


def test_fewer_clusters_are_unions_of_more():
    made = reducer(grid_size=8).eval()
    maps = {k: made.implied((8, 8), k, 1).index[0] for k in (3, 4, 7, 20, 33, 64)}
    for few, many in itertools.pairwise(maps):
        for place in range(many):
            assert len(maps[few][maps[many] == place].unique()) == 1
    assert torch.equal(maps[64], torch.arange(64))


def copied(assigned):
    """W: means over clusters, copied back to their cells."""
    return assigned @ (assigned / assigned.sum(0)).mT


def test_means_and_copies_are_a_projection_whose_error_is_that_within_clusters():
    index = linkage(random_distances(10, 0), 4)
    assigned = assignment(numbers(10, 6), index, 4, 0.1).double()
    matrix, cells = copied(assigned), numbers(10, 3).double()
    torch.testing.assert_close(matrix @ matrix, matrix)
    torch.testing.assert_close(matrix.sum(1), torch.ones(10).double())
    pairs = torch.cdist(cells, cells).square()
    within = sum(pairs[group][:, group].sum() / len(group) for group in as_lists(index)) / 2
    torch.testing.assert_close((matrix @ cells - cells).square().sum(), within)
    # Cells 0 and 2 in one cluster become 1 and 1: an error of 2.
    one = copied(torch.ones(2, 1))
    assert (one @ torch.tensor([0.0, 2.0])).tolist() == [1, 1]


def test_attention_to_merged_tokens_by_size_is_that_to_copies_of_them():
    torch.manual_seed(0)
    attention = Attention(8, 2)
    torch.nn.init.normal_(attention.qkv.weight)
    index = linkage(random_distances(12, 0), 5)
    layout = Source(index.expand(2, -1), 5)
    assigned = assignment(numbers(12, 8), index, 5, 0.1)
    cells = numbers(2, 12, 8)
    merged = attention(means_of(cells, assigned), layout.sizes().float()).tokens
    every = attention(copied(assigned) @ cells).tokens
    torch.testing.assert_close(unmerge(merged, layout), every, rtol=0, atol=1e-5)


def test_values_are_those_of_the_map_and_gradients_those_of_the_soft_assignment():
    embedding = numbers(6, 4).requires_grad_()
    index = torch.tensor([0, 0, 1, 2, 1, 0])
    cells, weights = numbers(2, 6, 3), numbers(2, 3, 3, seed=2)
    assigned = assignment(embedding, index, 3, 0.1)
    hard = torch.nn.functional.one_hot(index, 3).float()
    assert torch.equal(assigned, hard)
    means = means_of(cells, assigned)
    expected = merge(cells, Source(index.expand(2, -1), 3))
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-6)
    (found,) = torch.autograd.grad((means * weights).sum(), embedding)
    # More of a cell in a mean moves it towards the cell, in parts of the cluster's size.
    towards = (cells[:, :, None] - expected[:, None]) / hard.sum(0)[:, None]
    slopes = (towards * weights[:, None]).sum((0, 3))
    unit = torch.nn.functional.normalize(embedding, dim=-1)
    fixed = unit.detach()
    groups = [fixed[index == place].sum(0) for place in range(3)]
    centres = torch.nn.functional.normalize(torch.stack(groups), dim=-1)
    soft = (unit @ centres.mT / 0.1).softmax(-1)
    (wanted,) = torch.autograd.grad((soft * slopes).sum(), embedding)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted)


def test_gradients_of_tokens_reach_embeddings_unless_nothing_merges():
    made = reducer()
    for num_kept, moves in ((6, True), (16, False)):
        tokens = made(numbers(2, 16, 8), CLASS, (4, 4), num_kept).tokens
        (found,) = torch.autograd.grad(tokens.square().sum(), made.embedding)
        assert bool(found.any()) == moves


@pytest.mark.parametrize("num_grid_layers", [1, 2])
def test_training_and_evaluation_take_means_over_the_cells_of_their_maps(num_grid_layers):
    made = reducer(replace(SMALL, num_grid_layers=num_grid_layers))
    grid = numbers(2, 16, 8)
    for training in (True, False):
        out = made.train(training)(grid, CLASS, (4, 4), 6, taps=(num_grid_layers,))
        x = torch.cat([CLASS, grid], dim=1)
        for block in made.blocks[:num_grid_layers]:
            x = block(x)
        means = merge(x[:, 1:], out.layout)
        torch.testing.assert_close(out.taps[0], means, rtol=0, atol=1e-6)
        assert set(out.losses or {}) == ({"align"} if training else set())
        # One map for all images, which costs nothing.
        assert torch.equal(out.layout.index[0], out.layout.index[1])
        assert torch.equal(out.layout.index, made.implied((4, 4), 6, 2).index)
        assert out.layout.bits(8.0) == (48.0, 0.0, 0.0)


def test_noise_is_symmetric_bounded_and_another_after_a_step():
    noise = exploration_noise(numbers(6, 4))
    assert torch.equal(noise, noise.mT)
    assert noise.abs().max() == 1
    assert torch.equal(noise, exploration_noise(numbers(6, 4)))
    assert not torch.equal(noise, exploration_noise(numbers(6, 4) * (1 + 1e-6)))


def test_maps_of_training_have_noise_as_long_as_embeddings_learn():
    made = reducer(replace(SMALL, exploration=1.0), grid_size=8)
    explored = made.implied((8, 8), 20, 1).index
    assert torch.equal(made.implied((8, 8), 20, 1).index, explored)
    still = made.eval().implied((8, 8), 20, 1).index
    assert not torch.equal(explored, still)
    made.train().requires_grad_(requires_grad=False)
    assert torch.equal(made.implied((8, 8), 20, 1).index, still)
    without = reducer(replace(SMALL, exploration=0.0), grid_size=8)
    assert torch.equal(without.implied((8, 8), 20, 1).index, still)


def test_a_map_is_the_same_after_save_and_load(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer(shrink(digits32_global_map()).model).eval()
    torch.nn.init.normal_(tokenizer.encoder.reducer.embedding)
    tokenizer.save_pretrained(tmp_path / "model")
    again = Tokenizer.from_pretrained(tmp_path / "model")
    image = numbers(2, 3, 32, 32).clamp(-1, 1)
    for num_kept in (1, 16, 23):
        index = tokenizer.encode(image, num_kept).source.index
        assert torch.equal(index, again.encode(image, num_kept).source.index)
        assert torch.equal(index, again.recover(again.encode(image, num_kept).indices).index)
    assert not again.has_maps


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 6), (6, 1), (1, 1)])
def test_cells_of_two_quadrants_join_last(shape):
    made = reducer().eval()
    # Embeddings that are alike everywhere but for noise.
    torch.nn.init.normal_(made.embedding, mean=1.0, std=0.01)
    same = together(shape)
    num_quadrants = min(2, shape[0]) * min(2, shape[1])
    assert len(same.unique(dim=0)) == num_quadrants
    index = made.implied(shape, num_quadrants, 1).index[0]
    assert torch.equal(index[:, None] == index, same)
    assert made.implied(shape, 1, 1).index.unique().tolist() == [0]


def test_a_grid_of_another_shape_has_embeddings_between_those_of_the_trained_one():
    embedding = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    assert resized(embedding, (2, 2), (2, 2)) is embedding
    assert resized(embedding, (2, 2), (1, 1)).tolist() == [[3.0]]
    assert resized(embedding, (2, 2), (1, 2)).tolist() == [[2.0], [4.0]]
    out = reducer()(numbers(2, 24, 8), CLASS, (4, 6), 7)
    assert out.tokens.shape == (2, 7, 8)


def test_distances_are_cosines_whose_bits_do_not_depend_on_an_order_of_sums():
    embedding = 1000 * numbers(9, 300)
    found = distances_of(embedding)
    torch.testing.assert_close(found, 1 - cosines(embedding), rtol=0, atol=1e-5)
    places = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(cosines(embedding), cosines(embedding[:, places]))
    assert torch.equal(found, distances_of(embedding[:, places]))
    # A power of two in front changes nothing, and a vector of zeros is at right angles to all.
    assert torch.equal(found, distances_of(embedding / 2**30))
    assert torch.equal(distances_of(torch.zeros(3, 4)), torch.ones(3, 3))


def test_cells_near_each_other_share_tokens_at_the_start():
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    apart = []
    for noise in (0.02, 100.0):
        index = reducer(replace(SMALL, start_noise=noise), 8).eval().implied((8, 8), 20, 1).index
        same = (index[0][:, None] == index[0]).fill_diagonal_(fill_value=False)
        apart.append(torch.cdist(places, places)[same].mean())
    assert apart[0] < 1.5 < 1.8 < apart[1]


def test_alignment_by_hand_is_of_pairs_in_a_quadrant_beyond_the_margin():
    # Of 1 x 4 cells, 0 and 1 are in one half, 2 and 3 in the other.
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    cells = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.6, 0.8]]])
    # Cosines 0 against 1, and 1 against 0.6.
    assert alignment(embedding, cells, (1, 4), 0.0).item() == pytest.approx((1 + 0.4) / 2)
    assert alignment(embedding, cells, (1, 4), 0.25).item() == pytest.approx((0.75 + 0.15) / 2)
    (found,) = torch.autograd.grad(alignment(embedding, cells, (1, 4), 0.0), embedding)
    # Towards each other by half of one pair's share.
    assert found.tolist() == [[0, -0.5], [-0.5, 0], [0, 0], [0, 0]]
    # The mean over images is compared: with another whose cosines are -1 and 1, 0 and 0.8.
    more = torch.tensor([[[1.0, 0.0], [-3.0, 0.0], [1.0, 0.0], [0.6, 0.0]]])
    both = alignment(embedding, torch.cat([cells, more]), (1, 4), 0.0)
    assert both.item() == pytest.approx(0.2 / 2)
    # Cells that are a quadrant each have no pair.
    assert alignment(embedding, cells, (2, 2), 0.0) == 0


def test_embeddings_that_follow_features_have_their_cosines():
    torch.manual_seed(0)
    embedding = torch.randn(16, 8, requires_grad=True)
    cells = numbers(4, 16, 8) + 2 * numbers(16, 8, seed=2)
    descent = torch.optim.Adam([embedding], lr=0.1)
    for _ in range(50):
        descent.zero_grad()
        alignment(embedding, cells, (4, 4), 0.1).backward()
        descent.step()
    beyond = (cosines(cells).mean(0) - cosines(embedding)).abs()[together((4, 4))]
    assert beyond.max() < 0.2


def test_on_the_meta_device_a_map_has_its_shape_and_price():
    with torch.device("meta"):
        tokenizer = Tokenizer(digits32_global_map().model)
    assert tokenizer.bits(20) == (160.0, 0.0, 0.0)
    assert not tokenizer.has_maps
    assert tokenizer.encoder.reducer.implied((8, 8), 20, 3).index.shape == (3, 64)


def test_embeddings_that_are_no_numbers_and_numbers_of_tokens_are_refused():
    made = reducer()
    with pytest.raises(ValueError, match=r"num_kept \(17\) must be between 1 and the 16"):
        made.implied((4, 4), 17, 1)
    torch.nn.init.constant_(made.embedding, float("nan"))
    with pytest.raises(RuntimeError, match="embeddings of cells are not finite"):
        made.implied((4, 4), 6, 1)
