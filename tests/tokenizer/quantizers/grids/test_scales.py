"""Codes at several scales: the definition, by hand, and what they are in a tokenizer."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mergevq.config import parts as settings
from mergevq.config.recipes.scales import digits32_scales
from mergevq.data.layouts import Ordered
from mergevq.nn.conv import scale_sums
from mergevq.tokenizer.expanders.scale_sum import ScaleSum
from mergevq.tokenizer.quantizers.codebook import Codebook
from mergevq.tokenizer.quantizers.grids.scales import Scales
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.small import shrink

UPDATES = [settings.GradientUpdate(), settings.EmaUpdate()]


def quantizer(scales=(1, 2, 4), *, is_filtered=True, **values):
    """A small one, with filters that are not the identity any more."""
    torch.manual_seed(0)
    values = {"codebook_size": 16, "dim": 3, **values}
    part = Scales(settings.Scales(scales=scales, **values))
    if is_filtered:
        for each in part.filters:
            torch.nn.init.normal_(each.weight, std=0.2)
    return part


def latents_for(part, generator, count=2):
    cells = part.config.scales[-1] ** 2
    return torch.randn(count, cells, part.config.dim, generator=generator)


def slowly(part, latents):
    """Tokens and sums of one image by the definition, a code at a time."""
    scales, count = part.config.scales, len(part.filters)
    side, dim = scales[-1], part.config.dim
    table, share = part.table.codes(), part.config.filter_share
    rest = latents.T.reshape(dim, side, side)
    total, chosen, sums = torch.zeros_like(rest), [], []
    for number, scale in enumerate(scales):
        kernel = part.filters[number * count // len(scales)].weight
        codes = torch.empty(dim, scale, scale)
        for row in range(scale):
            for column in range(scale):
                rows = slice(row * side // scale, -(-(row + 1) * side // scale))
                columns = slice(column * side // scale, -(-(column + 1) * side // scale))
                mean = rest[:, rows, columns].mean((1, 2))
                best = min(range(len(table)), key=lambda v: (mean - table[v]).square().sum())
                chosen.append(best)
                codes[:, row, column] = table[best]
        enlarged = codes
        if scale != side:
            enlarged = functional.interpolate(codes[None], size=(side, side), mode="bicubic")[0]
        filtered = functional.conv2d(enlarged[None], kernel, padding=1)[0]
        added = share * filtered + (1 - share) * enlarged
        total, rest = total + added, rest - added
        sums.append(total.flatten(1).T)
    return chosen, sums


@pytest.mark.parametrize(
    ("scales", "num_filters"), [((1, 2, 4), 4), ((1, 3, 5), 2), ((2, 3, 4, 6), 1)]
)
def test_tokens_and_sums_are_those_of_the_definition(scales, num_filters, generator):
    part = quantizer(scales, num_filters=num_filters, filter_share=0.3)
    latents = latents_for(part, generator)
    codes, parts = part(latents)
    sums = list(scale_sums(codes, scales, part.kernels()))
    for image in range(2):
        chosen, expected = slowly(part, latents[image].clone())
        assert parts[image, :, 0].tolist() == chosen
        for found, wanted in zip(sums, expected, strict=True):
            torch.testing.assert_close(found[image].flatten(1).T, wanted, rtol=1e-4, atol=1e-5)


def test_a_grid_of_two_columns_by_hand():
    part = quantizer((1, 2), codebook_size=4, dim=1, is_filtered=False)
    with torch.no_grad():
        part.table.entries.weight.copy_(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]))
    latents = torch.tensor([[[1.0], [3.0], [1.0], [3.0]]])
    codes, parts = part(latents)
    # The mean is 2, and leaves -1 and 1 in turn.
    assert parts.flatten().tolist() == [3, 0, 2, 0, 2]
    coarse, fine = scale_sums(codes, (1, 2), part.kernels())
    assert coarse.flatten().tolist() == [2, 2, 2, 2]
    assert fine.flatten().tolist() == [1, 3, 1, 3]
    losses = part.losses(latents)
    assert {name: value.item() for name, value in losses.items()} == {
        "commitment": 0.5,
        "codebook": 0.5,
    }


@pytest.mark.parametrize("update", UPDATES)
def test_one_scale_without_a_filter_is_a_plain_codebook(update, generator):
    one = quantizer((4,), filter_share=0.0, update=update)
    plain = Codebook(settings.Codebook(codebook_size=16, dim=3, l2_norm=False, update=update))
    plain.table.load_state_dict(one.table.state_dict())
    latents = latents_for(one, generator)
    for found, expected in zip(one(latents), plain(latents), strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(one.losses(latents), plain.losses(latents))
    (total,) = scale_sums(one(latents).codes, (4,), one.kernels())
    assert torch.equal(total.flatten(2).mT, plain(latents).codes)
    for part in (one, plain):
        numbers = torch.Generator().manual_seed(1)
        part.follow(
            part.statistics(latents.flatten(0, 1), part(latents).parts.flatten(0, 1), numbers)
        )
    torch.testing.assert_close(one.table.codes(), plain.table.codes())


def test_the_last_scale_takes_no_channel_farther_where_zero_is_a_code(generator):
    part = quantizer(filter_share=0.0)
    with torch.no_grad():
        part.table.entries.weight[0] = 0
    latents = latents_for(part, generator, count=20)
    *_, before, after = (
        (latents - each.flatten(2).mT).square().sum(-1)
        for each in scale_sums(part(latents).codes, part.config.scales, part.kernels())
    )
    assert bool((after <= before + 1e-5).all())
    assert after.mean() < 0.9 * before.mean()


def test_gradients_pass_as_if_nothing_were_rounded(generator):
    part = quantizer(is_filtered=False)
    latents = latents_for(part, generator).requires_grad_()
    weights = torch.randn(2, 3, 4, 4, generator=generator)
    coarse, _, whole = scale_sums(part(latents).codes, (1, 2, 4), part.kernels())
    (of_all,) = torch.autograd.grad((whole * weights).sum(), latents, retain_graph=True)
    torch.testing.assert_close(of_all, weights.flatten(2).mT)
    # Of the first scale alone, a mean over the grid.
    (of_first,) = torch.autograd.grad((coarse * weights).sum(), latents)
    torch.testing.assert_close(of_first, weights.flatten(2).mean(2)[:, None].expand(-1, 16, -1))


def test_losses_are_means_over_scales_and_teach_one_side_each(generator):
    part = quantizer()
    latents = latents_for(part, generator).requires_grad_()
    sums = [
        torch.stack([slowly(part, image.detach())[1][scale] for image in latents])
        for scale in range(3)
    ]
    losses = part.losses(latents)
    expected = torch.stack([(latents - each).square().mean() for each in sums]).mean()
    torch.testing.assert_close(losses["commitment"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["codebook"], losses["commitment"], rtol=1e-4, atol=1e-5)
    own = list(part.parameters())
    of = dict.fromkeys(losses)
    for name, value in losses.items():
        of[name] = torch.autograd.grad(value, [latents, *own], allow_unused=True, retain_graph=True)
    assert [grad is None for grad in of["commitment"]] == [False, *(True for _ in own)]
    assert [grad is None for grad in of["codebook"]] == [True, *(False for _ in own)]


def test_running_means_are_those_of_all_scales():
    update = settings.EmaUpdate(decay=0.0, restart_below=0.0)
    part = quantizer((1, 2), codebook_size=3, dim=1, is_filtered=False, update=update)
    part.table.entries.sums.copy_(torch.tensor([[-1.0], [1.0], [2.0]]))
    latents = torch.tensor([[[1.2], [3.2], [1.2], [3.2]]])
    parts = part(latents).parts
    assert parts.flatten().tolist() == [2, 0, 1, 0, 1]
    part.follow(
        part.statistics(
            latents.flatten(0, 1), parts.flatten(0, 1), torch.Generator().manual_seed(0)
        )
    )
    assert part.table.entries.counts.tolist() == [2, 2, 1]
    expected = torch.tensor([-0.8 * 2, 1.2 * 2, 2.2])
    torch.testing.assert_close(part.table.entries.sums.flatten(), expected)


@pytest.mark.parametrize("num_kept", [1, 5, 9, 21])
def test_what_a_decoder_reads_is_added_from_stored_tokens_to_the_last_bit(num_kept, generator):
    part = quantizer()
    latents = latents_for(part, generator)
    codes, parts = part(latents)
    expander = ScaleSum(part)
    layout = part.implied((4, 4), num_kept, 2)
    given = expander(codes[:, :num_kept], layout, (4, 4))
    stored = expander(part.decode(parts[:, :num_kept]), layout, (4, 4))
    assert torch.equal(given.tokens, stored.tokens)
    assert given.style is given.tokens
    # As if tokens that are left out were zeros, in a step of training too.
    lengths = torch.tensor([num_kept, 21])
    cut = expander.train_pass(
        codes, codes, part.implied((4, 4), 21, 2), (4, 4), inferred=None, lengths=lengths
    )
    assert torch.equal(cut.given.tokens[0], given.tokens[0])
    if num_kept in (1, 5, 21):
        sums = list(scale_sums(codes, (1, 2, 4), part.kernels()))
        wanted = sums[(1, 5, 21).index(num_kept)]
        assert torch.equal(given.tokens, wanted.flatten(2).mT)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = Tokenizer(shrink(digits32_scales()).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_tokens_of_fewer_scales_are_the_first_ones_and_bits_are_counted(tokenizer, generator):
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    whole = tokenizer.encode(image, 85)
    bits = math.log2(tokenizer.config.quantizer.codebook_size)
    for num_kept in (1, 5, 21, 85):
        found = tokenizer.encode(image, num_kept)
        assert torch.equal(found.parts, whole.parts[:, :num_kept])
        assert tokenizer.bits(num_kept) == found.layout.bits(bits) == (num_kept * bits, 0, 0)
        assert tokenizer.num_tokens(image, num_kept) == num_kept
    assert len(found.parts.unique()) > 1
    decoded = tokenizer.decode(found.indices, found.layout)
    given = tokenizer.decode(found.codes, found.layout)
    assert torch.equal(decoded, given)
    coarse = tokenizer.decode(whole.indices[:, :21], Ordered(21))
    assert not torch.equal(decoded, coarse)


def test_weights_of_the_filters_have_one_name(tokenizer):
    names = [name for name in tokenizer.state_dict() if "filters" in name]
    assert names == [f"quantizer.filters.{number}.weight" for number in range(4)]
    again = Tokenizer.from_weights(tokenizer.config, tokenizer.state_dict())
    kernels = again.expander._quantizer[0].kernels()
    assert torch.equal(kernels, tokenizer.quantizer.kernels())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantizer": settings.Scales(scales=(1, 2, 4))},
            r"8 x 8 cells must have 4 x 4.*'tile'",
        ),
        ({"num_kept": 86}, r"num_kept \(86\) must be between 1 and the 85 tokens"),
        ({"expander": settings.Unmerge(dim=16)}, "set model.expander.kind to scale_sum"),
        ({"quantizer": settings.Lfq()}, "set model.expander.kind to unmerge"),
        (
            {"reducer": settings.Queries(num_layers=1, num_heads=2)},
            "without places: set model.reducer.kind to merge or pool",
        ),
        (
            {"branches": settings.TwoBranches(semantic_dim=4, taps=(1,))},
            r"branches.kind \(two\) must be one with quantizer.kind scales",
        ),
    ],
)
def test_what_does_not_fit_scales_is_refused_with_the_way_out(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tokenizer.config, **changes)


@pytest.mark.parametrize("scales", [(), (4, 2), (2, 2, 4)])
def test_scales_that_do_not_rise_are_refused(scales):
    with pytest.raises(ValueError, match="each larger than the one before"):
        settings.Scales(scales=scales)


def test_grids_of_another_size_and_later_quantization_are_refused(tokenizer):
    with pytest.raises(ValueError, match="a grid of 8 x 16 cells must have 8 x 8"):
        tokenizer.encode(torch.zeros(1, 3, 32, 64), 21)
    message = r"latents \(128\) must be those of 8 x 8 cells, .* which size_policy 'tile' cuts"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match=r"quantize_start_step \(3\) must be 0"):
        replace(digits32_scales(), quantize_start_step=3)
