"""Tail drop: how many tokens are left, and that the others are gone."""

from dataclasses import replace

import pytest
import torch

from mergevq.config import parts as settings
from mergevq.config.recipes.digits import digits32, digits32_nested, digits32_queries
from mergevq.config.recipes.digits import digits32_tail_drop as uniform
from mergevq.data.batches import Batch
from mergevq.data.layouts import Ordered
from mergevq.runtime import distributed
from mergevq.tokenizer.quantizers.lfq import Lfq
from mergevq.tokenizer.regularizers.tail_drop import TailDrop
from mergevq.tokenizer.seams import Regularized, StepDraws
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.tokenizer_step import build
from tests.support.small import shrink

NUM_KEPT = 12
ABSENT = ("cut", "token")
WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def model_of(absent="cut"):
    """A random tokenizer of up to 64 tokens, with weights that are no first ones."""
    run = shrink(uniform())
    model = replace(run.model, expander=replace(run.model.expander, absent=absent))
    torch.manual_seed(0)
    tokenizer = Tokenizer(model)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tokenizer


def image_of(tokenizer):
    side = tokenizer.config.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def lengths_drawn(config, num_images):
    quantizer = Lfq(settings.Lfq(num_bits=4))
    quantized = quantizer(torch.randn(num_images, NUM_KEPT, 4))
    draws = StepDraws(
        images=(torch.arange(num_images) + 0.5) / num_images,
        tokens=torch.empty(num_images, NUM_KEPT, 0),
        progress=torch.tensor(0.0),
    )
    codes, lengths = TailDrop(config)(quantized, quantizer=quantizer, draws=draws)
    assert torch.equal(codes, quantized.codes)
    return lengths


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ("uniform", dict.fromkeys(range(1, 13), 1 / 12)),
        ("powers", dict.fromkeys((1, 2, 4, 8, 12), 1 / 5)),
        ("rounded", {1: 1 / 12, 2: 1 / 12, 4: 2 / 12, 8: 4 / 12, 12: 4 / 12}),
    ],
)
def test_lengths_of_a_batch_are_spread_as_their_distribution(lengths, shares):
    drawn = lengths_drawn(settings.TailDrop(lengths=lengths), 120)
    found = {length: (drawn == length).float().mean().item() for length in drawn.unique().tolist()}
    assert found == pytest.approx(shares)


def train_pass(tokenizer, codes, lengths):
    shape = (tokenizer.config.grid_size,) * 2
    expanded = tokenizer.expander.train_pass(
        codes, codes, Ordered(codes.shape[1]), shape, inferred=None, lengths=lengths
    )
    return tokenizer.decoder(expanded.given)


@pytest.mark.parametrize("absent", ABSENT)
def test_no_dropped_token_changes_a_pixel_and_the_others_do(absent):
    tokenizer = model_of(absent)
    codes = torch.randn(2, NUM_KEPT, 8, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([3, 12])
    with torch.no_grad():
        first = train_pass(tokenizer, codes, lengths)
        later = codes.clone()
        later[0, 3:] += 100
        assert torch.equal(train_pass(tokenizer, later, lengths), first)
        later[0, 2] += 1
        assert not torch.equal(train_pass(tokenizer, later, lengths)[0], first[0])
        later = codes.clone()
        later[1, 11] += 1
        assert not torch.equal(train_pass(tokenizer, later, lengths)[1], first[1])


@pytest.mark.parametrize("absent", ABSENT)
def test_training_on_first_tokens_is_decoding_of_those_alone(absent):
    tokenizer = model_of(absent).eval()
    codes = torch.randn(2, NUM_KEPT, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        trained = train_pass(tokenizer, codes, torch.tensor([5, 5]))
        decoded = tokenizer.decode(codes[:, :5], Ordered(5))
        torch.testing.assert_close(decoded, trained, rtol=0, atol=1e-5)
        # All of them are no drop.
        whole = train_pass(tokenizer, codes, torch.tensor([NUM_KEPT, NUM_KEPT]))
        torch.testing.assert_close(whole, tokenizer.decode(codes, Ordered(NUM_KEPT)))


@pytest.mark.parametrize("absent", ABSENT)
def test_any_first_tokens_decode_and_are_those_of_more(absent):
    tokenizer = model_of(absent).eval()
    image = image_of(tokenizer)
    with torch.no_grad():
        whole = tokenizer.encode(image, 64)
        for num_kept in (1, 5, 16):
            found = tokenizer.reconstruct(image, num_kept)
            assert torch.equal(found.encoded.parts, whole.parts[:, :num_kept])
            assert torch.equal(
                found.image, tokenizer.decode(whole.codes[:, :num_kept], Ordered(num_kept))
            )


def test_every_weight_takes_part_where_nothing_is_dropped():
    tokenizer = model_of("token").train()
    output = tokenizer(
        image_of(tokenizer), 64, regularize=lambda q: Regularized(q.codes, torch.tensor([64, 64]))
    )
    output.reconstruction.sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.expander.parameters())


@pytest.mark.parametrize("recipe", [uniform, digits32_nested])
def test_a_step_drops_tokens_and_its_model_has_any_number_of_them(recipe):
    run = shrink(recipe())
    run = replace(run, train=replace(run.train, precision="float32"))
    learner = build(run, WORLD, num_classes=10)
    assert learner.state.tokenizer.config.kept_range == (1, 32)
    image = image_of(learner.state.tokenizer)
    batch = Batch(image, torch.zeros(2, dtype=torch.int64), None, None, torch.arange(2))
    draws = learner._draws(0, 1, batch, 16)
    few, all_ = (
        learner.losses(batch, 16, draws=draws._replace(images=torch.full((2,), share)))
        for share in (0.0, 0.99)
    )
    assert torch.equal(few[1].encoded.parts, all_[1].encoded.parts)
    assert few[0]["entropy"] == all_[0]["entropy"]
    assert few[0]["reconstruction"] != all_[0]["reconstruction"]


def test_tokens_without_an_order_and_others_than_the_first_are_refused():
    with pytest.raises(ValueError, match=r"tail_drop\) drops the last tokens, and those that"):
        replace(digits32(), regularizer=settings.TailDrop())
    with pytest.raises(ValueError, match=r"needs model\.reducer\.nested or "):
        replace(digits32_queries(), regularizer=settings.TailDrop())
    tokenizer = Tokenizer(shrink(digits32()).model)
    encoded = tokenizer.encode(image_of(tokenizer), 16)
    with pytest.raises(ValueError, match="none can be dropped"):
        tokenizer.expander.train_pass(
            encoded.codes,
            encoded.codes,
            encoded.layout,
            encoded.grid_shape,
            inferred=None,
            lengths=torch.tensor([1, 1]),
        )
