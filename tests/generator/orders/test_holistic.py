"""Order of tokens of the whole image before cells: exact, cached, order raster without any."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.parts.orders import Holistic
from mergevq.config.recipes.digits import digits32_ar, digits32_ordered
from mergevq.config.recipes.holistic import digits32_holistic, digits32_holistic_ar
from mergevq.data.images import open_images
from mergevq.data.layouts import Ordered as OrderedLayout
from mergevq.data.tokens.files import TokenRecord
from mergevq.generator.build import build_generator
from mergevq.generator.decoding import prefill, put_in
from mergevq.generator.generation import decode_sampled, generate, load_pair
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sampled, Sequences
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.encode import encode_images, token_record
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator import train
from mergevq.training.generator_step import fitted_config
from tests.support.generators import TINY, changed, tiny_generator
from tests.support.small import shrink, shrink_generator

ALL = 3 + TINY.num_tokens


def tiny(num_holistic=3, **changes):
    """A generator of random weights for tokens of the whole image and twelve cells."""
    kept = num_holistic + TINY.num_tokens
    config = {"num_kept": kept, "kept_candidates": (5, kept), **changes}
    return tiny_generator("holistic", num_holistic=num_holistic, **config)


def given(indices):
    """Sequences of class 0."""
    label = torch.zeros(len(indices), dtype=torch.int64)
    return Sequences(indices, label, indices.shape[1])


def tokens(rows=2, length=ALL):
    numbers = torch.Generator().manual_seed(2)
    return torch.randint(TINY.num_codes, (rows, length), generator=numbers)


@pytest.mark.parametrize("num_kept", [1, 2, 5])
def test_probabilities_of_all_sequences_sum_to_one(num_kept):
    model = tiny(1, sizes=(3,), grid_size=(2, 2), num_kept=5, kept_candidates=tuple(range(1, 6)))
    every = torch.tensor(list(itertools.product(range(3), repeat=num_kept)))
    total = model.log_likelihood(given(every)).detach().double().exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kept_candidates", [(), (12,)])
def test_without_tokens_of_the_whole_image_it_is_order_raster_bit_for_bit(kept_candidates):
    candidates = kept_candidates or (12,)
    first = tiny(0, num_kept=12, kept_candidates=candidates)
    second = tiny_generator("raster", num_kept=12, kept_candidates=candidates)
    assert first.state_dict().keys() == second.state_dict().keys()
    sequences = given(tokens(length=12))
    for one, other in zip(first.logits(sequences), second.logits(sequences), strict=True):
        assert torch.equal(one, other)
    losses = first.train()(sequences), second.train()(sequences)
    assert losses[0].total.requires_grad
    found = []
    for model in (first.eval(), second.eval()):
        settings = SamplingSettings(guidance_scale=2.0)
        labels = torch.tensor([0, 1])
        found.append(
            sample(model, labels=labels, num_kept=12, seed=3, image_ids=[0, 7], settings=settings)
        )
    assert torch.equal(found[0].indices, found[1].indices)
    assert found[0].kv_bytes == found[1].kv_bytes


def test_weights_are_drawn_as_those_of_order_raster():
    config = replace(TINY, num_kept=12, kept_candidates=(12,))
    states = []
    for order in ({"order": "holistic", "num_holistic": 0}, {"order": "raster"}):
        torch.manual_seed(0)
        states.append(build_generator(changed(config, **order)).state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("num_kept", [5, ALL])
def test_cached_sampling_takes_the_most_likely_tokens_of_a_whole_pass(num_kept):
    model = tiny()
    found = sample(
        model,
        labels=torch.tensor([0, 0]),
        num_kept=num_kept,
        seed=0,
        image_ids=range(2),
        settings=SamplingSettings(temperature=0.0),
    )
    assert found.indices.shape == (2, num_kept)
    assert found.source_index is None
    with torch.no_grad():
        logits = model.logits(given(found.indices))
    best = torch.stack([part.argmax(-1) for part in logits], dim=-1)
    assert torch.equal(best, model.network.codes(found.indices))


def test_states_with_a_cache_are_those_of_a_whole_pass():
    model, indices = tiny(), tokens()
    network, order, sequences = model.network, model.order, given(indices)
    layout = model.layout(sequences)
    kinds = order.kinds[[0] * 3 + [1] * TINY.num_tokens]
    cache = order.cache(network, batch=2, num_kept=ALL, settings=SamplingSettings())
    with torch.no_grad():
        states = network.transform(layout.inputs, network.turns(layout.positions), layout.mask)
        found = [prefill(network, cache, sequences.class_label, ALL, kinds[0])]
        for token, parts in enumerate(network.codes(indices)[:, :-1].unbind(1)):
            turns = order.turns(cache, parts, token)
            found.append(put_in(network, cache, parts, turns, kinds[token + 1]))
    found = torch.stack(found, dim=1)
    torch.testing.assert_close(found, states[:, layout.reads], rtol=1e-4, atol=1e-5)


def test_where_a_token_is_and_what_comes_next_is_in_its_input():
    model = tiny(2)
    indices = tokens(length=14)
    layout = model.layout(given(indices))
    cells = [[row, column] for row in (1, 2, 3) for column in (1, 2, 3, 4)]
    expected = [[0, 0], [0, 0], [0, 1], [0, 2], *cells[:-1]]
    assert layout.positions[0].tolist() == expected
    kinds, network = model.order.kinds, model.network
    prefix = network.embed_prefix(torch.zeros(2, dtype=torch.int64), 14)
    embedded = network.embed(network.codes(indices))
    # The merge instruction is before a token of the whole image, and the second of them a cell.
    rows = [prefix[:, 0], prefix[:, 1] + kinds[0], embedded[:, 0] + kinds[0]]
    rows += [embedded[:, place] + kinds[1] for place in range(1, 13)]
    torch.testing.assert_close(layout.inputs, torch.stack(rows, dim=1), rtol=0, atol=0)


def test_a_token_depends_on_those_before_it_alone():
    model, indices = tiny(), tokens(rows=1)
    later = indices.clone()
    later[0, 4] = (later[0, 4] + 1) % TINY.num_codes
    with torch.no_grad():
        first, second = (model.logits(given(each))[0] for each in (indices, later))
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5], second[:, 5])


@pytest.mark.parametrize("num_kept", [4, 68])
def test_samples_are_decoded_by_the_layout_that_they_imply(num_kept):
    torch.manual_seed(0)
    tokenizer = Tokenizer(shrink(digits32_holistic()).model).eval()
    numbers = torch.Generator().manual_seed(1)
    indices = torch.randint(256, (2, num_kept), generator=numbers)
    with torch.no_grad():
        images = decode_sampled(tokenizer, Sampled(indices, None, None, 1, 0), (8, 8))
        expected = tokenizer.decode(indices, OrderedLayout(num_kept), (8, 8)).clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_generator_is_trained_from_files_of_such_tokens_and_its_samples_are_pictures(tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    config = replace(shrink(digits32_holistic()).model, num_kept=68)
    tokenizer = Tokenizer(config).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    pixels = open_images("digits").subset(range(32))
    hashed = tokens_hash(tmp_path / "tokenizer")
    record = token_record(tokenizer, hashed, pixels, data="digits", num_kept=(68,))
    assert (record.layout, record.num_holistic, record.num_mapped) == ("holistic", 4, 0)
    encode_images(
        tokenizer, pixels, tmp_path / "tokens", record, world, batch_size=32, num_workers=0
    )
    places = {"path": str(tmp_path / "tokens"), "tokenizer": str(tmp_path / "tokenizer")}
    run = shrink_generator(digits32_holistic_ar())
    run = replace(
        run,
        model=replace(run.model, num_kept=68, kept_candidates=(68,)),
        kept=replace(run.kept, candidates=(68,)),
        tokens=replace(run.tokens, **places, val_fraction=0.25),
    )
    model = train(replace(run, out=str(tmp_path / "generator")))
    pair = load_pair(model, tmp_path / "tokenizer", torch.device("cpu"))
    sampled, images = generate(pair, SampleRun(), [0, 1])
    assert sampled.indices.shape == (2, 68)
    assert images.shape == (2, 3, 32, 32)


def record_of(layout, **changes):
    fields = {
        "tokenizer": "t",
        "num_kept": (16,),
        "sizes": (256,),
        "grid_shape": (8, 8),
        "data": "d",
        "images": "i",
        "num_images": 3,
        "class_names": (),
        "layout": layout,
    }
    return TokenRecord(**(fields | changes))


def test_orders_and_tokens_of_different_layouts_are_refused():
    run, holistic = digits32_holistic_ar(), {"num_kept": (68,), "num_holistic": 4}
    record = record_of("holistic", **holistic)
    assert fitted_config(run, record).order == run.model.order
    message = r"of the whole image .* model\.order\.kind {} makes .*: set model\.order\.kind to hol"
    for other in (digits32_ar(), digits32_ordered()):
        with pytest.raises(ValueError, match=message.format(other.model.order.kind)):
            fitted_config(other, record)
    for layout in ("source", "ordered"):
        with pytest.raises(ValueError, match=r"holistic makes .* whose model\.reducer\.kind is ho"):
            fitted_config(run, record_of(layout))


def test_another_number_of_tokens_of_the_whole_image_is_refused():
    run = digits32_holistic_ar()
    model = replace(run.model, order=Holistic(num_holistic=5))
    record = record_of("holistic", num_kept=(68,), num_holistic=4)
    with pytest.raises(ValueError, match=r"model\.order\.num_holistic \(5\) must be 4, as in the"):
        fitted_config(replace(run, model=model), record)
    message = r"num_kept \(69\) must be between 1 and the 64 cells .* and 4 tokens before them"
    with pytest.raises(ValueError, match=message):
        replace(run.model, num_kept=69)
    with pytest.raises(ValueError, match=r"num_kept \(69,\) .* 64 cells and 4 tokens before them"):
        record_of("holistic", num_kept=(69,), num_holistic=4)
    with pytest.raises(ValueError, match=r"num_holistic \(4\) must be 0 with layout 'ordered'"):
        record_of("ordered", num_holistic=4)
