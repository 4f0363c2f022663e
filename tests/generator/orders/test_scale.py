"""Order of scales: exact, cached, and from the very sums that the tokenizer decodes."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import SampleRun, SamplingSettings
from mergevq.config.parts.heads import Bits
from mergevq.config.recipes.digits import digits32_ar
from mergevq.config.recipes.scales import digits32_next_scale, digits32_scales
from mergevq.data.images import open_images
from mergevq.data.tokens.files import TokenRecord
from mergevq.generator.build import build_generator
from mergevq.generator.generation import decode_sampled, generate, load_pair
from mergevq.generator.sampling import sample
from mergevq.generator.seams import Sampled, Sequences
from mergevq.nn.conv import scale_sums, to_scale
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.encode import encode_images, token_record
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator import train
from mergevq.training.generator_step import build, fitted_config
from tests.support.generators import tiny_generator
from tests.support.small import shrink, shrink_generator

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
STARTS = {0: 0, 1: 1, 2: 5}
"""First token of each scale on a grid of 4 x 4."""


def tiny(**changes):
    """Scales of 1, 2 and 4, with filters that are not the identity."""
    values = {"grid_size": (4, 4), "num_kept": 21, "kept_candidates": (3, 5, 21), **changes}
    model = tiny_generator("scale", **values)
    numbers = torch.Generator().manual_seed(2)
    model.order.kernels += 0.2 * torch.randn(model.order.kernels.shape, generator=numbers)
    return model


def given(indices, label=0):
    labels = torch.full((len(indices),), label)
    return Sequences(indices, labels, indices.shape[1])


def random_tokens(model, num_kept=21, rows=2):
    numbers = torch.Generator().manual_seed(3)
    return torch.randint(model.config.num_codes, (rows, num_kept), generator=numbers)


@pytest.mark.parametrize("num_kept", [1, 3, 5])
def test_probabilities_of_all_sequences_sum_to_one(num_kept):
    model = tiny(sizes=(2,), grid_size=(2, 2), num_kept=5, kept_candidates=(1, 3, 5))
    every = torch.tensor(list(itertools.product(range(2), repeat=num_kept)))
    with torch.no_grad():
        total = model.log_likelihood(given(every)).double().exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_kept", [3, 21])
def test_states_of_the_cache_are_those_of_a_whole_pass(num_kept, monkeypatch):
    model = tiny()
    states, choose = [], model.network.choose
    monkeypatch.setattr(
        model.network, "choose", lambda each, *rest: states.append(each) or choose(each, *rest)
    )
    found = sample(
        model,
        labels=torch.tensor([0, 1]),
        num_kept=num_kept,
        seed=0,
        image_ids=range(2),
        settings=SamplingSettings(guidance_scale=2.0),
    )
    assert found.num_forward == len(states) == (3 if num_kept == 21 else 2)
    sequences = Sequences(found.indices, torch.tensor([0, 1]), num_kept)
    null = sequences._replace(class_label=torch.full((2,), model.config.null_class))
    for half, each in enumerate((sequences, null)):
        layout = model.layout(each)
        network = model.network
        with torch.no_grad():
            whole = network.transform(layout.inputs, network.turns(layout.positions), layout.mask)[
                :, layout.reads
            ]
        cached = torch.cat([step.unflatten(0, (4, -1))[2 * half :][:2] for step in states], 1)
        torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)


def test_the_most_likely_tokens_are_those_of_a_whole_pass():
    model = tiny()
    found = sample(
        model,
        labels=torch.tensor([0, 0]),
        num_kept=21,
        seed=0,
        image_ids=range(2),
        settings=SamplingSettings(temperature=0.0),
    )
    with torch.no_grad():
        logits = model.logits(given(found.indices))
    best = torch.stack([part.argmax(-1) for part in logits], dim=-1)
    assert torch.equal(best, model.network.codes(found.indices))


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_a_scale_depends_on_coarser_ones_alone(scale):
    model = tiny()
    tokens, start = random_tokens(model), STARTS[scale]
    others = tokens.clone()
    others[:, start:] = (others[:, start:] + 5) % model.config.num_codes
    count = (1, 4, 16)[scale]
    with torch.no_grad():
        first, second = (model.logits(given(each))[0] for each in (tokens, others))
    assert torch.equal(first[:, start : start + count], second[:, start : start + count])
    if scale:
        others = tokens.clone()
        others[:, start - 1] = (others[:, start - 1] + 5) % model.config.num_codes
        with torch.no_grad():
            third = model.logits(given(others))[0]
        # By each token of the scale, as the codes of one coarser token reach the whole grid.
        assert bool((first != third)[:, start : start + count].any(-1).all())


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_no_gradient_of_a_scale_reaches_it_or_a_finer_one(scale):
    model = tiny()
    tokens, (start, count) = random_tokens(model), (STARTS[scale], (1, 4, 16)[scale])
    order, codes = model.order, model.order.codes[random_tokens(model)].requires_grad_()
    sums = list(scale_sums(codes, order.scales, order.kernels))
    means = [
        to_scale(torch.zeros_like(sums[0]) if number == 0 else sums[number - 1], side)
        for number, side in enumerate(order.scales)
    ]
    embedded = [order.embed(model.network, each, number) for number, each in enumerate(means)]
    layout = model.layout(given(tokens))
    inputs = torch.cat([layout.inputs[:, :2].detach(), *embedded], dim=1)
    assert torch.equal(inputs, layout.inputs)
    turns = model.network.turns(layout.positions)
    states = model.network.transform(inputs, turns, layout.mask)[:, layout.reads]
    own = states[:, start : start + count].square().sum()
    (gradient,) = torch.autograd.grad(own, codes)
    assert gradient[:, start:].count_nonzero() == 0
    assert bool((gradient[:, :start] != 0).any(-1).all())


def test_tokens_of_a_scale_are_at_the_middle_of_their_areas():
    order, device = tiny().order, torch.device("cpu")
    assert order.positions(0, device).tolist() == [[2.5, 2.5]]
    assert order.positions(1, device).tolist() == [[1.5, 1.5], [1.5, 3.5], [3.5, 1.5], [3.5, 3.5]]
    cells = tiny_generator("raster", grid_size=(4, 4)).network.cell_positions()
    assert torch.equal(order.positions(2, device), cells)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer with odd filters, and a generator of its tokens that has its codes."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(shrink(digits32_scales()).model).eval()
    for each in tokenizer.quantizer.filters:
        torch.nn.init.normal_(each.weight, std=0.2)
    folder = tmp_path_factory.mktemp("scales") / "tokenizer"
    tokenizer.save_pretrained(folder)
    run = shrink_generator(digits32_next_scale())
    return tokenizer, replace(run, tokens=replace(run.tokens, tokenizer=str(folder)))


def record_of(run):
    return TokenRecord(
        tokenizer=tokens_hash(run.tokens.tokenizer),
        num_kept=run.kept.candidates,
        sizes=(256,),
        grid_shape=(8, 8),
        data="d",
        images="i",
        num_images=3,
        class_names=(),
        layout="scales",
    )


def test_inputs_are_made_from_the_sums_that_the_tokenizer_decodes_to_the_last_bit(pair):
    tokenizer, run = pair
    generator = build(run, WORLD, record_of(run)).state.generator
    order = generator.order
    assert not [name for name, _ in order.named_parameters() if "codes" in name.split(".")]
    numbers = torch.Generator().manual_seed(4)
    image = torch.rand(2, 3, 32, 32, generator=numbers) * 2 - 1
    encoded = tokenizer.encode(image, 85)
    given = tokenizer.expander(encoded.codes, encoded.layout, (8, 8))
    *_, total = scale_sums(order.codes[encoded.indices], order.scales, order.kernels)
    assert torch.equal(total.flatten(2).mT, given.tokens)
    for scale, num_kept in ((1, 1), (2, 5), (3, 21)):
        coarse = tokenizer.encode(image, num_kept)
        given = tokenizer.expander(coarse.codes, coarse.layout, (8, 8)).tokens
        (means,) = order.means(generator.network, encoded.parts, range(scale, scale + 1))
        assert torch.equal(means, to_scale(given.mT.unflatten(2, (8, 8)), 2**scale))


def test_averages_of_weights_have_the_same_codes(pair):
    _, run = pair
    state = build(run, WORLD, record_of(run)).state
    for _ in range(3):
        state.ema.update()
    for name in ("codes", "kernels"):
        own = getattr(state.generator.order, name)
        assert torch.equal(state.ema.shadow[f"order.{name}"], own)


def test_what_does_not_fit_the_tokenizer_is_refused_with_the_way_out(pair):
    _, run = pair

    def with_order(**values):
        return replace(run, model=replace(run.model, order=replace(run.model.order, **values)))

    for changed, message in (
        (
            with_order(scales=(1, 3, 5, 8)),
            r"model.order.scales \(1, 3, 5, 8\) must be \(1, 2, 4, 8",
        ),
        (with_order(code_dim=4), r"codes \(256, 4\) must be \(256, 8\).* model.order.code_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            build(changed, WORLD, record_of(run))
    with pytest.raises(ValueError, match=r"at several scales.*: set model.order.kind to scale"):
        fitted_config(replace(digits32_ar(), tokens=run.tokens), record_of(run))
    with pytest.raises(ValueError, match=r"model\.quantizer\.kind is scales"):
        fitted_config(run, replace(record_of(run), num_kept=(20,), layout="source"))
    config = run.model
    for changes, message in (
        ({"grid_size": (8, 4)}, "must end with the side of a square grid, and the grid is 8 x 4"),
        ({"num_kept": 86}, r"num_kept \(86\) must be between 1 and the 85 tokens of all scales"),
        ({"head": Bits(sizes=(2,) * 8)}, r"head.kind \(bits\) must be subindices"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)


@pytest.mark.parametrize("num_kept", [5, 21, 85])
def test_samples_are_decoded_by_the_layout_that_they_imply(num_kept, pair):
    tokenizer, _ = pair
    indices = torch.randint(256, (2, num_kept), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = decode_sampled(tokenizer, Sampled(indices, None, None, 1, 0), (8, 8))
        layout = tokenizer.recover(indices)
        expected = tokenizer.decode(indices, layout, (8, 8)).clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_codes_of_a_generator_without_a_tokenizer_are_stand_ins():
    torch.manual_seed(0)
    order = build_generator(shrink_generator(digits32_next_scale()).model).order
    assert 0.2 < order.codes.std() < 0.4
    means = torch.randn(1, 8, 3, 3)
    kept = torch.nn.functional.conv2d(means, order.kernels[0], padding=1)
    assert torch.equal(kept, means)


@pytest.mark.slow
def test_a_generator_is_trained_from_files_of_scales_and_its_samples_are_pictures(pair, tmp_path):
    pytest.importorskip("sklearn")
    tokenizer, run = pair
    pixels = open_images("digits").subset(range(32))
    hashed = tokens_hash(run.tokens.tokenizer)
    record = token_record(tokenizer, hashed, pixels, data="digits", num_kept=(21, 85))
    rows = encode_images(
        tokenizer, pixels, tmp_path / "tokens", record, WORLD, batch_size=32, num_workers=0
    )
    assert rows.batch([0], 85).parts.shape == (1, 85, 1)
    run = replace(run, tokens=replace(run.tokens, path=str(tmp_path / "tokens"), val_fraction=0.25))
    model = train(replace(run, out=str(tmp_path / "generator")))
    found = load_pair(model, run.tokens.tokenizer, torch.device("cpu"))
    codes = tokenizer.quantizer.table.codes()
    assert torch.equal(found.generator.order.codes, codes)
    sampled, images = generate(found, SampleRun(), [0, 1])
    assert sampled.indices.shape == (2, run.model.num_kept)
    assert sampled.num_forward == len(tokenizer.config.quantizer.scales)
    assert images.shape == (2, 3, 32, 32)
