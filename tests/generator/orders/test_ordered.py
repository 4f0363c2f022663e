"""Order of ordered tokens: exact, cached, without places, and decoded by the layout they imply."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.recipes.digits import digits32_ar, digits32_causal, digits32_ordered
from mergevq.data.images import open_images
from mergevq.data.layouts import Ordered as OrderedLayout
from mergevq.data.tokens.files import TokenRecord
from mergevq.generator.generation import decode_sampled, generate, load_pair
from mergevq.generator.orders.ordered import positions
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sampled, Sequences
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.encode import encode_images, token_record
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator import train
from mergevq.training.generator_step import fitted_config
from tests.support.generators import tiny_generator
from tests.support.small import shrink, shrink_generator


def given(indices):
    """Sequences of class 0."""
    label = torch.zeros(len(indices), dtype=torch.int64)
    return Sequences(indices, label, indices.shape[1])


@pytest.mark.parametrize("num_kept", [1, 2, 4])
def test_probabilities_of_all_sequences_sum_to_one(num_kept):
    model = tiny_generator(
        "ordered", sizes=(3,), grid_size=(2, 2), num_kept=2, kept_candidates=(1, 2, 4)
    )
    every = torch.tensor(list(itertools.product(range(3), repeat=num_kept)))
    total = model.log_likelihood(given(every)).detach().double().exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-5, atol=0)


def test_cached_sampling_takes_the_most_likely_tokens_of_a_whole_pass():
    model = tiny_generator("ordered")
    found = sample(
        model,
        labels=torch.tensor([0, 0]),
        num_kept=5,
        seed=0,
        image_ids=range(2),
        settings=SamplingSettings(temperature=0.0),
    )
    assert found.source_index is None
    assert found.anchors is None
    with torch.no_grad():
        logits = model.logits(given(found.indices))
    best = torch.stack([part.argmax(-1) for part in logits], dim=-1)
    assert torch.equal(best, model.network.codes(found.indices))


def test_a_token_depends_on_those_before_it_and_on_their_order():
    model = tiny_generator("ordered")
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    later = tokens.clone()
    later[0, 3] = 9
    with torch.no_grad():
        first, second = (model.logits(given(indices))[0] for indices in (tokens, later))
        swapped = model.logits(given(tokens[:, [1, 0, 2, 3, 4]]))[0]
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4], second[:, 4])
    assert not torch.allclose(first[:, 4], swapped[:, 4])


def test_tokens_are_in_row_0_where_no_cell_is():
    assert positions(3, torch.device("cpu")).tolist() == [[[0, 1], [0, 2], [0, 3]]]
    cells = tiny_generator("raster").network.cell_positions()
    assert int(cells[:, 0].min()) == 1


@pytest.mark.parametrize("num_kept", [3, 16, 64])
def test_samples_are_decoded_by_the_layout_that_they_imply(num_kept):
    torch.manual_seed(0)
    tokenizer = Tokenizer(shrink(digits32_causal()).model).eval()
    indices = torch.randint(256, (2, num_kept), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = decode_sampled(tokenizer, Sampled(indices, None, None, 1, 0), (8, 8))
        expected = tokenizer.decode(indices, OrderedLayout(num_kept), (8, 8)).clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_generator_is_trained_from_files_of_ordered_tokens_and_its_samples_are_pictures(tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    tokenizer = Tokenizer(shrink(digits32_causal()).model).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    pixels = open_images("digits").subset(range(32))
    hashed = tokens_hash(tmp_path / "tokenizer")
    record = token_record(tokenizer, hashed, pixels, data="digits", num_kept=(16,))
    encode_images(
        tokenizer, pixels, tmp_path / "tokens", record, world, batch_size=32, num_workers=0
    )
    places = {"path": str(tmp_path / "tokens"), "tokenizer": str(tmp_path / "tokenizer")}
    run = shrink_generator(digits32_ordered())
    run = replace(run, tokens=replace(run.tokens, **places, val_fraction=0.25))
    model = train(replace(run, out=str(tmp_path / "generator")))
    pair = load_pair(model, tmp_path / "tokenizer", torch.device("cpu"))
    sampled, images = generate(pair, SampleRun(), [0, 1])
    assert sampled.indices.shape == (2, 16)
    assert images.shape == (2, 3, 32, 32)


def record_of(layout):
    return TokenRecord(
        tokenizer="t",
        num_kept=(16,),
        sizes=(256,),
        grid_shape=(8, 8),
        data="d",
        images="i",
        num_images=3,
        class_names=(),
        layout=layout,
    )


def test_orders_and_tokens_of_different_layouts_are_refused():
    run = digits32_ordered()
    assert fitted_config(run, record_of("ordered")).order == run.model.order
    with pytest.raises(ValueError, match=r"a source map, and model\.order\.kind ordered makes"):
        fitted_config(run, record_of("source"))
    message = r"are ordered, without a place on the grid, .* set model\.order\.kind to ordered"
    with pytest.raises(ValueError, match=message):
        fitted_config(replace(digits32_ar(), tokens=run.tokens), record_of("ordered"))
