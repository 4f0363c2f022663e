"""Every kind of every part of a tokenizer does what its seam promises.

The kinds are read off the settings: a new one is tested as it is added, in a small tokenizer of the
recipe `digits32` whose other parts are the recipe's. See `mergevq.tokenizer.seams`.
"""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch

from mergevq.cli.tables import reconstruction_table
from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.evaluation import ReconstructionSettings, RobustnessSettings, Subject
from mergevq.config.kinds import unions
from mergevq.config.objective import LossConfig
from mergevq.config.parts import (
    Binary,
    ClassCondition,
    Fsq,
    GroupedLfq,
    TextCondition,
    weights_of,
)
from mergevq.config.parts.orders import Scale
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.config.training import TokenizerRun
from mergevq.data.batches import eval_batches
from mergevq.data.images import open_images
from mergevq.data.layouts import Source, merge
from mergevq.evaluate.reconstruction import evaluate_reconstruction
from mergevq.evaluate.robustness.run import evaluate_robustness
from mergevq.generator.build import load_generator
from mergevq.generator.export.folder import export_folder
from mergevq.metrics.codes import CodebookUsage, codebook_statistics
from mergevq.report.pictures import to_pil
from mergevq.runtime import distributed
from mergevq.tokenizer.build import build_regularizer
from mergevq.tokenizer.codec import (
    decode_image,
    encode_image,
    reconstruct_image,
    reconstruction_figure,
)
from mergevq.tokenizer.compressed import PictureCodec, compress_image, decompress_image
from mergevq.tokenizer.encode import encode, encode_images, token_record
from mergevq.tokenizer.export.graphs import tokenizer_graphs
from mergevq.tokenizer.seams import Quantized, StepDraws
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.contest.measure import points
from mergevq.training.generator import train as train_generator
from mergevq.training.tokenizer import train
from tests.support.leaves import replaced, value_at
from tests.support.small import shrink, shrink_generator

NUM_KEPT = 16
KINDS = {
    union.name.rpartition(".")[2]: [f"{union.name}.kind={kind}" for kind in union.members]
    for union in unions(TokenizerRun)
    if union.name.startswith(("model.", "regularizer"))
}
KINDS["quantizer"] += KINDS.pop("update")  # How codes are learned is a kind of quantizer too.
KINDS["continuous"] = ["model.quantizer.kind=kl", "model.quantizer.kind=none"]
KINDS["discrete"] = [part for part in KINDS["quantizer"] if part not in KINDS["continuous"]]
PARTS = list(
    dict.fromkeys(part for kinds in KINDS.values() for part in kinds if part.startswith("model."))
)
"""Parts that a saved model has."""


def of(seam):
    return pytest.mark.parametrize("part", KINDS[seam], ids=lambda part: part.partition("=")[2])


@functools.cache
def small(part):
    """A small random tokenizer in training with a part of this kind."""
    name, _, kind = part.partition("=")
    config = replaced(shrink(digits32()), {name: kind}).model
    torch.manual_seed(0)
    model = Tokenizer(config)
    for parameter in model.parameters():
        # Not where training starts: there some branches are silent.
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def images(model, height=1, width=1):
    """Two images, in units of the trained size."""
    side = model.config.image_size
    numbers = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, height * side, width * side, generator=numbers) * 2 - 1


def latents_of(model):
    numbers, cells = torch.Generator().manual_seed(2), model.config.grid_size
    count = model.config.num_reduced((cells, cells), NUM_KEPT)
    return torch.randn(2, count, model.config.latent_dim, generator=numbers)


def tokens_of(model, latents, *uniforms):
    """The tokens that are kept of latents; of scales there are more."""
    return Quantized(*(each[:, :NUM_KEPT] for each in model.quantizer(latents, *uniforms)))


def condition_for(model):
    """Conditions of two images; None where there is no place for them."""
    match model.config.condition:
        case ClassCondition():
            return torch.tensor([0, -1])
        case TextCondition(dim=dim):
            return torch.ones(2, 1, dim)
    return None


def require_gradients(module, loss):
    """Every parameter takes part in the loss, and every gradient is finite."""
    module.zero_grad()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.isfinite().all(), name
    module.zero_grad()


# --------------------------------------------------------------------------------- each seam


@of("stem")
@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_a_stem_gives_channels_for_each_cell(part, shape):
    model = small(part)
    grid = model.encoder.stem(images(model, *shape))
    cells = model.config.grid_size
    assert grid.shape == (2, model.config.dim, shape[0] * cells, shape[1] * cells)
    require_gradients(model.encoder.stem, grid.square().mean())


@of("reducer")
@pytest.mark.parametrize("num_kept", [NUM_KEPT, 24, 64])
def test_a_reducer_leaves_as_many_tokens_as_are_asked_for(part, num_kept):
    model = small(part)
    cells = model.config.grid_size
    model.config.reducer.check_kept((cells, cells), num_kept)
    tokens, class_token, layout, _, losses = model.encoder(images(model), num_kept)
    assert tokens.shape == (2, num_kept, model.config.dim)
    assert class_token.shape == (2, model.config.dim)
    assert layout.num_kept == num_kept
    assert set(losses or {}) == set(own := weights_of(model.config.reducer))
    assert not set(own) & {*weights_of(LossConfig()), *weights_of(model.config.quantizer)}
    assert all(value.shape == () and value.isfinite() for value in (losses or {}).values())
    require_gradients(model.encoder.reducer, tokens.square().mean() + class_token.square().mean())


@of("reducer")
def test_a_reducer_can_stop_after_any_block_and_recompute_them(part):
    model = small(part)
    reducer = model.encoder.reducer
    layers = len(reducer.blocks)
    whole = model.encoder(images(model), NUM_KEPT)
    stopped = model.encoder(images(model), NUM_KEPT, num_layers=layers)
    assert torch.equal(whole.tokens, stopped.tokens)
    for num_layers in range(layers):
        part_way = model.encoder(images(model), NUM_KEPT, num_layers=num_layers)
        assert part_way.tokens.shape[1] == part_way.layout.num_kept >= NUM_KEPT
    reducer.checkpointing = True
    try:
        recomputed = model.encoder(images(model), NUM_KEPT)
    finally:
        reducer.checkpointing = False
    assert torch.equal(whole.tokens, recomputed.tokens)
    assert all(hasattr(block, "ls1") and hasattr(block, "ls2") for block in reducer.blocks)


@of("reducer")
@pytest.mark.parametrize("num_kept", [NUM_KEPT, 64])
def test_a_reducer_has_the_same_tokens_after_earlier_blocks(part, num_kept):
    model = small(part)
    reducer, num_layers = model.encoder.reducer, len(model.encoder.reducer.blocks)
    embedded = model.encoder.embed(images(model))
    class_token = model.encoder.class_token.expand(2, 1, -1)
    given = (embedded.tokens, class_token, embedded.grid_shape, num_kept)
    plain = reducer(*given)
    out = reducer(*given, taps=(num_layers, 1, 0))
    assert torch.equal(out.tokens, plain.tokens)
    last, first, start = out.taps
    assert last.shape == first.shape == start.shape == plain.tokens.shape
    torch.testing.assert_close(last, plain.tokens)
    assert not torch.allclose(first, last)
    if num_kept == 64:
        expected = reducer(*given, num_layers=1).tokens
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    if isinstance(plain.layout, Source):
        torch.testing.assert_close(start, merge(embedded.tokens, plain.layout))
    reducer.checkpointing = True
    try:
        again = reducer(*given, taps=(num_layers, 1, 0)).taps
    finally:
        reducer.checkpointing = False
    assert all(map(torch.equal, out.taps, again))


@of("branches")
def test_branches_give_latents_a_summary_and_channels_to_decode(part):
    model = small(part)
    config, image = model.config, images(model)
    out = model.encoder(image, NUM_KEPT)
    latents = model.encoder.latents(out)
    assert latents.shape == (2, NUM_KEPT, config.quantizer.dim)
    assert model.encoder.summary(out).shape == (2, config.summary_dim)
    assert model.decoded(latents).shape == (2, NUM_KEPT, config.decoded_dim)
    # Every weight takes part in a step of training, with a teacher and without.
    for view in (None, image[..., :24, :24]):
        output = model(image, NUM_KEPT, view)
        assert output.summary.shape == (2, config.summary_dim)
        losses = sum(output.losses.values()) + output.reconstruction.square().mean()
        require_gradients(model, losses + output.summary.square().mean())


@of("reducer")
def test_the_numbers_of_tokens_that_a_reducer_leaves_are_known_before(part):
    config, grid = small(part).config, (8, 8)
    reducer = config.reducer
    least, most = reducer.least_kept(grid), config.most_kept(grid)
    reducer.check_kept(grid, least)
    for num_kept in (1, 17, 64):
        reducer.check_kept(grid, reducer.nearest_kept(grid, num_kept))
    for num_kept in (0, most + 1, least - 1):
        with pytest.raises(ValueError, match=rf"num_kept \({num_kept}\) must be "):
            reducer.check_kept(grid, num_kept)


@of("reducer")
def test_a_layout_is_implied_where_images_do_not_decide_it(part):
    model = small(part)
    encoded = model.encode(images(model), NUM_KEPT)
    implied = model.encoder.reducer.implied(encoded.grid_shape, NUM_KEPT, 2)
    assert model.has_maps == (implied is None)
    assert encoded.layout.bits(1.0) == model.bits(NUM_KEPT)._replace(tokens=float(NUM_KEPT))
    recovered = model.recover(encoded.indices, encoded.grid_shape)
    assert type(recovered) is type(encoded.layout)
    if implied is not None:
        assert model.bits(NUM_KEPT).source == 0
        again = model.decode(encoded.indices, recovered, encoded.grid_shape)
        given = model.decode(encoded.indices, encoded.layout, encoded.grid_shape)
        assert torch.equal(given, again)


@of("discrete")
def test_codes_are_those_of_the_parts_to_the_last_bit(part):
    model = small(part)
    quantizer, settings = model.quantizer, model.config.quantizer
    spec = quantizer.spec
    assert (spec.sizes, spec.dim) == (settings.sizes, settings.dim)
    assert spec.is_binary == isinstance(settings, Binary)
    assert spec.bits == spec.dim or not spec.is_binary
    codes, parts = tokens_of(model, latents_of(model))
    assert codes.shape == (2, NUM_KEPT, spec.dim)
    assert parts.shape == (2, NUM_KEPT, len(spec.sizes))
    assert torch.equal(quantizer.decode(parts), codes)
    assert bool((parts >= 0).all())
    assert bool((parts < torch.tensor(spec.sizes)).all())
    assert torch.equal(spec.split(spec.join(parts)), parts)
    # More than one token is used.
    assert len(parts.flatten(0, 1).unique(dim=0)) > 1


@of("discrete")
@pytest.mark.parametrize("wrong", ["below", "above"])
def test_a_part_that_does_not_exist_is_refused(part, wrong):
    quantizer = small(part).quantizer
    for number, size in enumerate(quantizer.spec.sizes):
        parts = torch.zeros(1, len(quantizer.spec.sizes), dtype=torch.int64)
        parts[0, number] = -1 if wrong == "below" else size
        with pytest.raises(ValueError, match=str(parts[0, number].item())):
            quantizer.decode(parts)


@of("quantizer")
def test_gradients_of_codes_and_of_losses_reach_the_latents(part):
    model = small(part)
    latents = latents_of(model).requires_grad_()
    losses = model.quantizer.losses(latents)
    own = weights_of(model.config.quantizer)
    assert set(own) <= set(losses) <= {"commitment", "entropy", *own}
    # Weights of other names are those of all tokenizers.
    assert not set(own) & set(weights_of(LossConfig()))
    for value in (tokens_of(model, latents).codes.square().sum(), *losses.values()):
        assert value.shape == ()
        assert value.isfinite()
    (of_codes,) = torch.autograd.grad(tokens_of(model, latents).codes.sum(), latents)
    assert of_codes.isfinite().all()
    assert of_codes.count_nonzero() > 0
    if losses:
        (of_losses,) = torch.autograd.grad(sum(losses.values()), latents)
        assert of_losses.isfinite().all()


@of("discrete")
def test_tokens_depend_on_numbers_only_where_a_quantizer_draws(part):
    model = small(part)
    latents, quantizer = latents_of(model), model.quantizer
    shape = (2, NUM_KEPT, quantizer.spec.dim)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    codes, parts = tokens_of(model, latents, uniforms)
    assert torch.equal(quantizer.decode(parts), codes)
    assert torch.equal(tokens_of(model, latents, uniforms).parts, parts)
    assert torch.equal(parts, tokens_of(model, latents).parts) != quantizer.is_random


@of("discrete")
@pytest.mark.parametrize("num_near", [1.0, 100.0, 4095.0])
def test_a_near_token_exists_and_is_another_one(part, num_near):
    model = small(part)
    quantizer = model.quantizer
    parts = tokens_of(model, latents_of(model)).parts
    shape = (2, NUM_KEPT, quantizer.spec.dim + 1)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    near = quantizer.near(parts, uniforms, torch.tensor(num_near))
    assert near.shape == parts.shape
    quantizer.decode(near)
    assert bool((near != parts).any(-1).all())
    assert torch.equal(near, quantizer.near(parts, uniforms, torch.tensor(num_near)))
    # Numbers at both ends are no exception.
    for end in (0.0, 1 - 2**-24):
        quantizer.decode(near := quantizer.near(parts, 0 * uniforms + end, torch.tensor(num_near)))
        assert bool((near != parts).any(-1).all())


@of("discrete")
def test_the_nearest_tokens_differ_in_one_channel_or_one_entry_of_a_table(part):
    model = small(part)
    quantizer = model.quantizer
    codes, parts = tokens_of(model, latents_of(model))
    shape = (2, NUM_KEPT, quantizer.spec.dim + 1)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    near = quantizer.near(parts, uniforms, torch.tensor(1e-9))
    assert (near != parts).sum(-1).unique().tolist() == [1]
    if not quantizer.state_dict():
        assert (quantizer.decode(near) != codes).sum(-1).unique().tolist() == [1]


@of("quantizer")
def test_tokens_do_not_depend_on_autocast(part):
    model = small(part)
    latents = latents_of(model)
    plain = tokens_of(model, latents)
    with torch.autocast("cpu", torch.bfloat16):
        cast = tokens_of(model, latents)
    assert torch.equal(plain.parts, cast.parts)
    assert torch.equal(plain.codes, cast.codes)
    assert cast.codes.dtype == torch.float32
    if not model.quantizer.spec.is_continuous:
        with torch.autocast("cpu", torch.bfloat16):
            assert model.quantizer.decode(cast.parts).dtype == torch.float32


@of("discrete")
@pytest.mark.parametrize("kind", [part.partition("=")[2] for part in KINDS["regularizer"]])
def test_a_regularizer_changes_tokens_and_no_gradient(part, kind):
    model = small(part)
    regularizer = build_regularizer(replaced(digits32(), {"regularizer.kind": kind}).regularizer)
    if regularizer is None:
        return  # Nothing is built, and there is nothing to change codes.
    num_draws = regularizer.num_draws(model.quantizer.spec)
    latents = latents_of(model).requires_grad_()
    quantized = tokens_of(model, latents)
    numbers = torch.Generator().manual_seed(3)
    draws = StepDraws(
        images=torch.tensor([0.0, 0.99]),
        tokens=torch.rand(2, NUM_KEPT, num_draws, generator=numbers),
        progress=torch.tensor(0.5),
    )
    codes, lengths = regularizer(quantized, quantizer=model.quantizer, draws=draws)
    assert codes.shape == quantized.codes.shape
    assert codes.dtype == quantized.codes.dtype
    assert torch.equal(codes, quantized.codes) == (lengths is not None)
    again = regularizer(quantized, quantizer=model.quantizer, draws=draws)
    assert torch.equal(codes, again.codes)
    if lengths is not None:
        assert torch.equal(lengths, again.lengths)
        assert bool((lengths >= 1).all())
        assert lengths[0] < lengths[1] <= NUM_KEPT
    assert not list(regularizer.parameters())
    found, expected = (
        torch.autograd.grad(value.sum(), latents, retain_graph=True)[0]
        for value in (codes, quantized.codes)
    )
    assert torch.equal(found, expected)


@of("continuous")
def test_real_numbers_are_codes_without_parts(part):
    model = small(part)
    quantizer, settings = model.quantizer, model.config.quantizer
    spec = quantizer.spec
    assert spec.is_continuous
    assert (spec.sizes, spec.dim) == (settings.sizes, settings.dim) == ((), settings.dim)
    assert math.isnan(spec.bits)
    assert not spec.has_index
    latents = latents_of(model)
    codes, parts = tokens_of(model, latents)
    assert codes.shape == (2, NUM_KEPT, spec.dim)
    assert parts.shape == (2, NUM_KEPT, 0)
    uniforms = torch.rand(codes.shape, generator=torch.Generator().manual_seed(3))
    drawn = tokens_of(model, latents, uniforms).codes
    assert torch.equal(drawn, tokens_of(model, latents, uniforms).codes)
    assert torch.equal(drawn, codes) != quantizer.is_random
    for end in (0.0, 1 - 2**-24):
        assert tokens_of(model, latents, 0 * uniforms + end).codes.isfinite().all()


NO_INDICES = "needs tokens with indices, and this tokenizer's are real numbers: "


@of("continuous")
def test_what_needs_indices_refuses_real_numbers(part, tmp_path):
    pytest.importorskip("sklearn")
    model = small(part).eval()
    try:
        folder = str(tmp_path / "model")
        model.save_pretrained(folder)
        encoded = model.encode(images(model), NUM_KEPT)
        parts, uniforms = encoded.parts, torch.zeros(2, NUM_KEPT, model.quantizer.spec.dim + 1)
        subject = Subject(model=folder, data="digits", max_images=2, num_workers=0)
        away = RobustnessSettings(subject=subject, out=str(tmp_path / "robustness"))
        zeros = torch.zeros(2, NUM_KEPT, dtype=torch.int64)
        run = replace(digits32(), model=replace(digits32().model, quantizer=model.config.quantizer))
        arm = Arm(name="an arm", run=run)
        contest = ContestSettings(arms=(arm,), num_kept=(NUM_KEPT,))
        for refused in (
            lambda: encoded.indices,
            lambda: model.decode(zeros, encoded.layout),
            lambda: model.decode(parts, encoded.layout),
            lambda: model.quantizer.near(parts, uniforms, torch.tensor(1.0)),
            lambda: encode(folder, "digits", tmp_path / "tokens", num_workers=0),
            lambda: PictureCodec.from_pretrained(folder),
            lambda: tokenizer_graphs(model, (NUM_KEPT,)),
            lambda: export_folder(folder, tmp_path / "graphs", "pt2"),
            lambda: evaluate_robustness(away),
            lambda: CodebookUsage(model.quantizer.spec),
            lambda: codebook_statistics(parts.flatten(0, 1), model.quantizer.spec),
            lambda: points(contest, arm),
        ):
            with pytest.raises(ValueError, match=NO_INDICES):
                refused()
        assert not (tmp_path / "tokens").exists()
    finally:
        model.train()


@of("continuous")
def test_real_numbers_have_no_near_tokens_and_are_not_quantized_later(part):
    run = replaced(shrink(digits32()), dict([part.split("=")]))
    with pytest.raises(ValueError, match=r"quantize_start_step \(3\) must be 0"):
        replace(run, quantize_start_step=3)
    with pytest.raises(ValueError, match=r"regularizer.kind \(perturb\) must be another"):
        replaced(run, {"regularizer.kind": "perturb"})


@of("continuous")
def test_real_numbers_are_reconstructed_and_evaluated(part, tmp_path):
    pytest.importorskip("sklearn")
    model = small(part).eval()
    try:
        model.save_pretrained(tmp_path / "model")
        picture = to_pil(images(model)[0])
        result = reconstruct_image(model, picture, NUM_KEPT)
        dim = model.config.quantizer.dim
        assert result.cost == f"{NUM_KEPT * dim} real numbers"
        assert "real numbers per pixel" in result.price
        assert f"{dim} real numbers a token\n" in repr(model)
        reconstruction_figure([result])
    finally:
        model.train()
    subject = Subject(model=str(tmp_path / "model"), data="digits", max_images=6, num_workers=0)
    settings = ReconstructionSettings(
        subject=subject, num_kept=(NUM_KEPT, 24), out=str(tmp_path / "evaluation")
    )
    record = evaluate_reconstruction(settings)
    assert [result["continuous"]["num_floats"] for result in record["results"]] == [
        NUM_KEPT * dim,
        24 * dim,
    ]
    assert all(result["codebook"] is result["bits"] is None for result in record["results"])
    assert not record["baselines"]
    table = reconstruction_table(record)
    for words in ("continuous", "real numbers", "channels in use"):
        assert words in table
    assert "codebook" not in table
    assert not (tmp_path / "evaluation/rate_distortion.png").exists()


@of("expander")
def test_an_expander_gives_an_embedding_for_each_cell(part):
    model = small(part)
    expander, cells = model.expander, model.config.grid_size
    encoded = model.encode(images(model), NUM_KEPT)
    codes = model.codes_of(encoded.indices)
    given = expander(codes, encoded.layout, (cells, cells))
    dim, style_dim = model.config.expander.given_dims(model.config.quantizer.dim)
    assert given.tokens.shape == (2, cells**2, dim)
    assert given.grid_shape == (cells, cells)
    assert (None if given.style is None else given.style.shape[-1]) == style_dim


@of("expander")
def test_every_weight_of_an_expander_takes_part_in_every_step(part):
    model = small(part)
    grid = (model.config.grid_size,) * 2
    encoded = model.encode(images(model), NUM_KEPT)
    codes = model.codes_of(encoded.indices)
    for inferred in (None, torch.tensor([True, False])):
        if inferred is not None and not model.expander.can_infer:
            continue
        step = model.expander.train_pass(codes, codes, encoded.layout, grid, inferred=inferred)
        assert all(value.shape == () and value.isfinite() for value in step.losses.values())
        require_gradients(model.expander, step.given.tokens.sum() + sum(step.losses.values()))


@of("expander")
def test_a_layout_is_inferred_or_refused(part):
    model = small(part)
    grid = (model.config.grid_size,) * 2
    codes = model.codes_of(model.encode(images(model), NUM_KEPT).indices)
    if model.expander.can_infer:
        assert model.expander.infer(codes, grid).num_kept == NUM_KEPT
    else:
        with pytest.raises(ValueError, match="infer"):
            model.expander.infer(codes, grid)


@of("decoder")
@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_a_decoder_makes_pixels_of_every_cell(part, shape):
    model = small(part)
    image = images(model, *shape)
    encoded = model.encode(image, NUM_KEPT)
    codes = model.codes_of(encoded.indices)
    given = model.expander(codes, encoded.layout, model.grid_shape(image))
    decoded = model.decoder(given)
    assert decoded.shape == image.shape
    model.decoder.checkpointing = True
    try:
        recomputed = model.decoder(given)
    finally:
        model.decoder.checkpointing = False
    assert torch.equal(decoded, recomputed)
    require_gradients(model.decoder, decoded.square().mean())


@of("decoder")
def test_tokens_of_every_block_of_a_decoder_can_be_had(part):
    model = small(part)
    encoded = model.encode(images(model), NUM_KEPT)
    given = model.expander(encoded.codes, encoded.layout, encoded.grid_shape)
    settings = model.config.decoder
    outputs = dict.fromkeys(range(settings.num_blocks + 1), given.tokens)
    assert torch.equal(model.decoder(given, outputs), model.decoder(given))
    for tokens in outputs.values():
        assert tokens.shape == (2, model.config.num_tokens, settings.width)
    for number in range(settings.num_blocks):
        assert not torch.equal(outputs[number], outputs[number + 1])


# ------------------------------------------------------------------------- in a whole tokenizer


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("model.")])
def test_a_tokenizer_with_the_part_is_the_same_after_it_was_saved(part, tmp_path):
    model = small(part).eval()
    try:
        name, _, kind = part.partition("=")
        assert value_at(model.config, name.removeprefix("model.")) == kind
        name = "codes" if model.quantizer.spec.is_continuous else "indices"
        told = condition_for(model)
        before = model.encode(images(model), NUM_KEPT, told)
        decoded = model.decode(getattr(before, name), before.layout, condition=told)
        model.save_pretrained(tmp_path / "model")
        again = Tokenizer.from_pretrained(tmp_path / "model")
        after = again.encode(images(model), NUM_KEPT, told)
        assert torch.equal(getattr(before, name), getattr(after, name))
        found = again.decode(getattr(after, name), after.layout, condition=told)
        assert torch.equal(decoded, found)
    finally:
        model.train()


WIDE = [GroupedLfq(num_bits=72, group_bits=8), Fsq(levels=(8,) * 24)]
"""Quantizers of 72 bits, so that a token has no index."""


@pytest.mark.parametrize("quantizer", WIDE, ids=lambda quantizer: quantizer.kind)
def test_tokens_above_63_bits_are_parts_in_memory_and_in_files(quantizer, tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    config = replace(shrink(digits32()).model, quantizer=quantizer)
    tokenizer = Tokenizer(config).eval()
    pixels = open_images("digits").subset(range(3))
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    record = token_record(tokenizer, "a" * 64, pixels, data="digits", num_kept=(NUM_KEPT,))
    assert record.bits == 72
    folder = tmp_path / "tokens"
    rows = encode_images(tokenizer, pixels, folder, record, world, batch_size=64, num_workers=0)
    stored = rows.batch(range(3))
    assert stored.parts.shape == (3, NUM_KEPT, len(quantizer.sizes))
    (batch,) = eval_batches(pixels, image_size=32, batch_size=3, num_workers=0)
    with torch.no_grad():
        encoded = tokenizer.encode(batch.image, NUM_KEPT)
        assert torch.equal(stored.parts, encoded.parts)
        assert torch.equal(tokenizer.codes_of_parts(stored.parts), encoded.codes)
        found = tokenizer.decode(stored.parts, stored.layout)
        assert torch.equal(found, tokenizer.decode(encoded.codes.contiguous(), encoded.layout))
    message = "a token has 72 bits, and an index has 63: use `parts`"
    for tokens in (encoded, stored):
        with pytest.raises(ValueError, match=message):
            _ = tokens.indices
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(torch.zeros(3, NUM_KEPT, dtype=torch.int64), stored.layout)


@pytest.mark.parametrize("quantizer", WIDE, ids=lambda quantizer: quantizer.kind)
def test_a_picture_of_tokens_above_63_bits_is_compressed(quantizer):
    pytest.importorskip("constriction")
    torch.manual_seed(0)
    config = replace(shrink(digits32()).model, quantizer=quantizer)
    codec = PictureCodec(tokenizer=Tokenizer(config).eval(), identity="a" * 64)
    picture = to_pil(images(codec.tokenizer)[0])
    found = decompress_image(codec, compress_image(codec, picture).data)
    expected = decode_image(codec.tokenizer, encode_image(codec.tokenizer, picture))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", WIDE, ids=lambda quantizer: quantizer.kind)
def test_tokens_above_63_bits_are_trained_evaluated_and_refused_by_generators(quantizer, tmp_path):
    pytest.importorskip("sklearn")
    run = shrink(digits32())
    data = replace(run.data, max_images=12, num_workers=0)
    steps = replace(run.train, num_steps=2)
    model = replace(run.model, quantizer=quantizer)
    folder = train(replace(run, model=model, data=data, train=steps, out=str(tmp_path / "run")))
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any(0 < line.get("codebook_usage", 0) < 1e-15 for line in log)
    subject = Subject(model=str(folder), data="digits", max_images=12, num_workers=0)
    settings = ReconstructionSettings(
        subject=subject,
        num_kept=(NUM_KEPT,),
        num_baseline_images=0,
        out=str(tmp_path / "evaluation"),
    )
    (result,) = evaluate_reconstruction(settings)["results"]
    assert 0 < result["codebook"]["usage"] < 1e-15
    encode(folder, "digits", tmp_path / "tokens", num_kept=(16, 24), num_workers=0)
    generator = shrink_generator(digits32_ar())
    places = {"path": str(tmp_path / "tokens"), "tokenizer": str(folder)}
    tokens = replace(generator.tokens, **places)
    with pytest.raises(ValueError, match="have 72 bits, and a generator takes tokens of at most"):
        train_generator(replace(generator, tokens=tokens, out=str(tmp_path / "generator")))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_tokenizer_with_the_part_trains_and_is_validated(part, tmp_path):
    pytest.importorskip("sklearn")
    name, _, kind = part.partition("=")
    run = replaced(shrink(digits32()), {name: kind})
    data = replace(run.data, max_images=12, num_workers=0)
    if isinstance(run.model.condition, TextCondition):
        with pytest.raises(ValueError, match="training has the classes of images and no texts"):
            train(replace(run, data=data, out=str(tmp_path / "run")))
        return
    model = train(replace(run, data=data, out=str(tmp_path / "run")))
    trained = replace(run, model=Tokenizer.from_pretrained(model).config)
    assert value_at(trained, name) == kind


@pytest.mark.slow
@of("discrete")
def test_tokens_are_evaluated_and_a_generator_learns_their_parts(part, tmp_path):
    pytest.importorskip("sklearn")
    tokenizer = small(part).eval()
    try:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        sizes = tokenizer.quantizer.spec.sizes
    finally:
        tokenizer.train()
    record = evaluate_reconstruction(
        ReconstructionSettings(
            subject=Subject(
                model=str(tmp_path / "tokenizer"), data="digits", max_images=12, num_workers=0
            ),
            num_kept=(NUM_KEPT,),
            num_baseline_images=0,
            out=str(tmp_path / "evaluation"),
        )
    )
    assert record["results"][0]["num_kept"] == NUM_KEPT
    encode(tmp_path / "tokenizer", "digits", tmp_path / "tokens", num_kept=(16, 24), num_workers=0)
    run = shrink_generator(digits32_ar())
    head = replace(run.model.head, sizes=sizes)
    places = {"path": str(tmp_path / "tokens"), "tokenizer": str(tmp_path / "tokenizer")}
    order = run.model.order
    if tokenizer.config.kept_by.gives == "scales":
        order = Scale(code_dim=tokenizer.config.quantizer.dim)
    run = replace(
        run,
        model=replace(run.model, head=head, order=order),
        tokens=replace(run.tokens, **places),
        out=str(tmp_path / "generator"),
    )
    generator = load_generator(train_generator(run))
    assert generator.config.head.sizes == sizes
