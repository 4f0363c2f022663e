"""Tables: the nearest code by brute force, means and rotation by hand, two ranks as one."""

import pytest
import torch

from mergevq.config.parts import EmaUpdate, GradientUpdate
from mergevq.tokenizer.quantizers import tables
from mergevq.tokenizer.quantizers.tables import (
    RunningMeans,
    Table,
    follow,
    near_codes,
    nearest,
    rotate,
    statistics_of,
)
from tests.support.quantize import value_and_gradient
from tests.support.ranks import free_port, run_on_ranks, take_place


def table(size=6, dim=3, *, l2_norm=False, rotates=False, update=None):
    torch.manual_seed(0)
    update = update or GradientUpdate()
    return Table(size, dim, l2_norm=l2_norm, rotates=rotates, update=update)


def averaged(counts, sums, **settings):
    """Running means that are these."""
    means = RunningMeans(*sums.shape, EmaUpdate(**settings))
    means.counts.copy_(counts)
    means.sums.copy_(sums)
    return means


def follow_with(of, latents, seed=0):
    """One step of these latents on one rank."""
    generator = torch.Generator().manual_seed(seed)
    follow([of], statistics_of([of], [latents], [of(latents)[1]], generator))


# ------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_the_nearest_code_is_the_one_of_the_least_distance(at_once, generator, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_SCORES", at_once)
    latents = torch.randn(3, 7, 5, generator=generator)
    codes = torch.randn(20, 5, generator=generator)
    distances = (latents[..., None, :].double() - codes.double()).square().sum(-1)
    assert torch.equal(nearest(latents, codes), distances.argmin(-1))


def test_of_equally_near_codes_it_is_the_first():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[0.5, 0.5], [0.0, 2.0]]), codes).tolist() == [0, 1]


def test_codes_of_length_1_are_compared_by_their_angle(generator):
    of, latents = table(20, 5, l2_norm=True), torch.randn(9, 5, generator=generator)
    cosines = torch.cosine_similarity(latents[:, None], of.entries.weight, dim=-1)
    codes, chosen = of(latents)
    assert torch.equal(chosen, cosines.argmax(-1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(9))
    assert torch.equal(codes, of.codes()[chosen])


def test_near_codes_are_the_nearest_others_in_even_shares():
    codes = torch.tensor([[0.0], [1.0], [2.1], [3.3], [3.3]])
    uniforms = torch.linspace(0, 1 - 2**-24, 8)
    # 3 of 5 codes: of entry 1 these are 0, 2, and one of the two that are equal.
    found = near_codes(codes, torch.full((8,), 1), uniforms, torch.tensor(4096 * 0.6))
    assert found.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    # Of codes that are equal another one is meant all the same.
    assert near_codes(codes, torch.tensor([3, 4]), uniforms[:2], torch.tensor(1.0)).tolist() == [
        4,
        3,
    ]


# -------------------------------------------------------------------------------- gradients


def test_gradients_go_straight_from_codes_to_latents(generator):
    of, latents = table(), torch.randn(4, 3, generator=generator)
    weights = torch.randn(4, 3, generator=generator)
    _, found = value_and_gradient(lambda z: of(z)[0] * weights, latents)
    assert torch.equal(found, weights)
    of(latents.requires_grad_())[0].sum().backward()
    assert of.entries.weight.grad is None


@pytest.mark.parametrize(("upstream", "gradient"), [((1, 0), (0, -1.5)), ((0, 1), (1.5, 0))])
def test_a_rotated_gradient_by_hand(upstream, gradient):
    code, weights = torch.tensor([0.0, 3.0]), torch.tensor(upstream).float()
    rotated, found = value_and_gradient(
        lambda z: rotate(z, code) * weights, torch.tensor([2.0, 0.0])
    )
    torch.testing.assert_close(rotated, code * weights)
    torch.testing.assert_close(found, torch.tensor(gradient).float())


@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_rotation_keeps_the_angle_between_latent_and_gradient(l2_norm, generator):
    of = table(8, 5, rotates=True, l2_norm=l2_norm)
    latents = torch.randn(9, 5, generator=generator)
    weights = torch.randn(9, 5, generator=generator)
    codes = of.codes()[of(latents)[1]].detach()
    rotated, found = value_and_gradient(lambda z: rotate(z, codes) * weights, latents)
    torch.testing.assert_close(rotated, codes * weights)
    inner = (found * latents).sum(-1)
    torch.testing.assert_close(inner, (weights * codes).sum(-1))
    ratio = codes.norm(dim=-1) / latents.norm(dim=-1)
    torch.testing.assert_close(found.norm(dim=-1), ratio * weights.norm(dim=-1))
    assert torch.equal(of(latents)[0], codes)


def test_where_there_is_no_rotation_the_gradient_goes_straight():
    latents = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    codes = torch.tensor([[-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    _, found = value_and_gradient(lambda z: rotate(z, codes), latents)
    assert torch.equal(found, torch.ones(3, 2))


# ----------------------------------------------------------------------------------- losses


def test_losses_by_hand_move_one_side_each():
    of = table(2, 2)
    with torch.no_grad():
        of.entries.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 4.0]]))
    latents = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)
    losses = of.losses(latents)
    assert {name: value.item() for name, value in losses.items()} == {
        "commitment": 0.5,
        "codebook": 0.5,
    }
    losses["commitment"].backward(retain_graph=True)
    assert latents.grad.tolist() == [[0.5, 0], [-0.5, 0]]
    assert of.entries.weight.grad is None
    losses["codebook"].backward()
    assert latents.grad.tolist() == [[0.5, 0], [-0.5, 0]]
    assert of.entries.weight.grad.tolist() == [[-0.5, 0], [0.5, 0]]


@pytest.mark.parametrize("update", [GradientUpdate(), EmaUpdate(restart_below=0.0)])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_latents_that_are_codes_have_no_loss_and_move_nothing(update, l2_norm):
    of = table(update=update, l2_norm=l2_norm)
    codes = of.codes().detach().clone()
    assert torch.equal(of(codes)[1], torch.arange(len(codes)))
    for value in of.losses(codes).values():
        assert value.item() == pytest.approx(0, abs=1e-12)
    follow_with(of, codes)
    torch.testing.assert_close(of.codes(), codes, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- running means


def test_a_running_mean_by_hand():
    means = averaged(torch.ones(1), torch.tensor([[2.0]]), decay=0.9)
    # Latents 4 and 6, and any that it could begin again from.
    means.follow(torch.tensor([[2.0, 10.0, 7.0]]))
    assert means.counts.tolist() == pytest.approx([1.1])
    assert means.sums.flatten().tolist() == pytest.approx([2.8])
    assert means().flatten().tolist() == pytest.approx([2.5454545])


def test_smoothed_counts_keep_their_sum():
    counts, sums = torch.tensor([0.0, 3.0]), torch.tensor([[1.0], [3.0]])
    expected = sums[:, 0] / ((counts + 1e-5) / (3 + 2e-5) * 3)
    torch.testing.assert_close(averaged(counts, sums)().flatten(), expected)


def test_a_code_that_is_hardly_used_becomes_a_latent():
    counts, sums = torch.tensor([0.1, 1.9, 4.0]), torch.tensor([[9.0, 9.0]] * 3)
    means = averaged(counts, sums, decay=0.0, restart_below=0.5)
    statistics = torch.tensor(
        [[0.4, 0.0, 0.0, 5.0, 6.0], [1.6, 1.0, 2.0, 7.0, 8.0], [4.0, 3.0, 4.0, 0.0, 0.0]]
    )
    means.follow(statistics)
    # The mean count is 2, so that codes of less than 1 start again with a count of 1.
    assert means.counts.tolist() == pytest.approx([1.0, 1.6, 4.0])
    assert means.sums.tolist() == [[5, 6], [1, 2], [3, 4]]
    torch.testing.assert_close(means()[0], torch.tensor([5.0, 6.0]), rtol=1e-4, atol=0)


def test_codes_start_again_from_latents_of_the_step_drawn_at_random(generator):
    of = table(16, 3, update=EmaUpdate(decay=0.0, restart_below=1.0))
    latents = torch.randn(40, 3, generator=generator)
    follow_with(of, latents, seed=5)
    drawn = torch.randint(40, (1, 16), generator=torch.Generator().manual_seed(5))[0]
    restarted = (of.codes()[:, None] - latents).abs().amax(-1) < 1e-3
    rows = restarted.any(-1).nonzero().flatten()
    assert 1 <= len(rows) < 16
    assert restarted[rows, drawn[rows]].all()


def test_one_table_that_follows_equals_sums_over_its_tokens(generator):
    of = table(4, 3, update=EmaUpdate(decay=0.7, restart_below=0.0), l2_norm=True)
    latents = torch.randn(30, 3, generator=generator)
    units, chosen = torch.nn.functional.normalize(latents, dim=-1), of(latents)[1]
    counts, sums = of.entries.counts.clone(), of.entries.sums.clone()
    follow_with(of, latents)
    for code in range(4):
        mine = units[chosen == code]
        expected = 0.7 * sums[code] + 0.3 * mine.sum(0)
        torch.testing.assert_close(of.entries.sums[code], expected)
        assert of.entries.counts[code].item() == pytest.approx(
            0.7 * counts[code].item() + 0.3 * len(mine)
        )


def test_weights_do_not_follow(generator):
    of = table()
    before = of.codes().detach().clone()
    follow_with(of, torch.randn(9, 3, generator=generator))
    assert torch.equal(of.codes(), before)


def of_two_ranks():
    """Two tables with codes that start again, and the tokens of a step."""
    update = EmaUpdate(decay=0.5, restart_below=0.9)
    tables_of = [table(8, 3, update=update, l2_norm=bool(n)) for n in range(2)]
    latents = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(4))
    return tables_of, latents


def follow_on_a_rank(rank, port, path):
    from mergevq.runtime import distributed

    take_place(rank, port)
    distributed.init(torch.device("cpu"))
    of, latents = of_two_ranks()
    own = list(latents[:, 10 * rank : 10 * (rank + 1)])
    chosen = [each(z)[1] for each, z in zip(of, own, strict=True)]
    follow(of, distributed.sums(statistics_of(of, own, chosen, torch.Generator().manual_seed(1))))
    states = [each.state_dict() for each in of]
    distributed.shutdown()
    torch.save(states, f"{path}/{rank}.pt")


def test_two_ranks_equal_one_process(tmp_path):
    of, latents = of_two_ranks()
    chosen = [each(z)[1] for each, z in zip(of, latents, strict=True)]
    before = [each.entries.counts.clone() for each in of]
    follow(of, statistics_of(of, list(latents), chosen, torch.Generator().manual_seed(1)))
    run_on_ranks(follow_on_a_rank, free_port(), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for alone, counts, one, two in zip(of, before, first, second, strict=True):
        assert not torch.equal(alone.entries.counts, counts)
        for name, value in alone.state_dict().items():
            assert torch.equal(one[name], two[name]), name
            torch.testing.assert_close(one[name], value)
