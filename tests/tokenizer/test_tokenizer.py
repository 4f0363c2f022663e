"""The tokenizer end to end: shapes, sizes, source recovery, files."""

import contextlib
import dataclasses
import socket
import warnings

import jaxtyping
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from mergevq.data.layouts import Source, unmerge
from mergevq.data.prepare import to_tensor
from mergevq.tokenizer.bits import indices_to_codes, quantize
from mergevq.tokenizer.expanders.recovery import most_likely_source
from mergevq.tokenizer.seams import Given
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.data import noise
from tests.support.parts import changed, tokenizer_config
from tests.support.tokenizer import G

G_R = changed(G, channel_mult=(2, 2, 2, 4), num_kept=9)
R = changed(G, stem="patch", patch_dim=32, position_embedding=True)
VERSIONS = pytest.mark.parametrize("config", [G, G_R, R], ids=["G", "G+R", "R"])


def tokenizer(config=G):
    """Random weights large enough that every part shows in the output."""
    model = Tokenizer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(batch=2, height=32, width=32):
    return torch.rand(batch, 3, height, width) * 2 - 1


def training_loss(model, image, num_kept=20, view=None):
    """A loss that every output of a training pass enters."""
    out = model(image, num_kept, view)
    loss = (out.reconstruction - image).square().mean() + out.encoded.class_token.square().mean()
    loss = loss + out.losses["source"]
    return loss if view is None else loss + out.summary.square().mean()


@contextlib.contextmanager
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


# ------------------------------------------------------------------------------------- shapes


@VERSIONS
def test_an_image_becomes_tokens_and_an_image_again(config):
    model, image = tokenizer(config), images()
    encoded = model.encode(image)
    assert encoded.codes.shape == encoded.latents.shape == (2, config.num_kept, 6)
    assert encoded.indices.shape == (2, config.num_kept)
    assert encoded.source.index.shape == (2, config.num_tokens)
    assert encoded.source.num_kept == config.num_kept
    assert encoded.grid_shape == (config.grid_size, config.grid_size)
    assert encoded.class_token.shape == (2, config.dim)
    decoded = model.decode(encoded.codes, encoded.source)
    assert decoded.shape == image.shape
    assert decoded.isfinite().all()
    losses = model(image, config.num_kept).losses
    assert set(losses) == {"commitment", "entropy", "source"}
    logits = model.expander.predictor(encoded.codes, encoded.grid_shape)
    assert logits.shape == (2, config.num_tokens, config.num_kept)
    expected = nn.functional.cross_entropy(logits.mT, encoded.source.index)
    torch.testing.assert_close(losses["source"], expected)


@VERSIONS
def test_tokens_leave_in_canonical_order(config):
    source = tokenizer(config).encode(images(3)).source
    anchors = source.anchors()
    assert (anchors.diff() > 0).all()
    assert anchors[:, 0].eq(0).all()
    assert (source.sizes() >= 1).all()


def test_codes_and_indices_are_the_signs_of_the_latents():
    encoded = tokenizer().encode(images())
    assert torch.equal(encoded.codes, encoded.latents.sign())
    assert torch.equal(indices_to_codes(encoded.indices, 6), encoded.codes)


@VERSIONS
@pytest.mark.parametrize("merge_shape", ["linear", "square", "constant"])
def test_any_number_of_tokens_may_be_kept(config, merge_shape):
    config = changed(config, merge_shape=merge_shape)
    model, image = tokenizer(config), images(1)
    # Six layers halve 64 tokens to 1.
    for num_kept in {1, 2, 7, config.num_tokens - 1, config.num_tokens}:
        encoded = model.encode(image, num_kept)
        assert encoded.indices.shape == (1, num_kept)
        assert model.num_tokens(image, num_kept) == num_kept
        assert encoded.source.index.unique().tolist() == list(range(num_kept))
        assert model.decode(encoded.indices, encoded.source).isfinite().all()


@VERSIONS
def test_the_stem_runs_once_for_several_numbers_of_tokens_to_the_last_bit(config):
    model, image = tokenizer(config), images()
    calls = []
    model.encoder.stem.register_forward_hook(lambda *_: calls.append(1))
    embedded = model.embed(image)
    together = [model.encode(embedded, num_kept) for num_kept in (5, 15, None)]
    again = model.reconstruct(embedded, 15, "recovered").image
    assert len(calls) == 1
    for one, num_kept in zip(together, (5, 15, None), strict=True):
        alone = model.encode(image, num_kept)
        assert one.source.num_kept == alone.source.num_kept
        assert torch.equal(one.source.index, alone.source.index)
        for name in ("codes", "indices", "class_token", "latents"):
            assert torch.equal(getattr(one, name), getattr(alone, name))
    assert torch.equal(again, model.reconstruct(image, 15, "recovered").image)


def test_an_embedded_image_is_checked_as_an_image_is():
    model = tokenizer()
    with pytest.raises(ValueError, match="must be finite and between -1 and 1"):
        model.embed(images() + 3)
    with pytest.raises(ValueError, match=r"num_kept \(65\) must be between 1 and the 64 tokens"):
        model.encode(model.embed(images()), 65)


def test_keeping_all_tokens_merges_nothing():
    source = tokenizer().encode(images(), num_kept=64).source
    assert torch.equal(source.index, torch.arange(64).expand(2, -1))


def test_positions_of_a_patch_stem_tell_equal_patches_apart():
    plain = changed(R, position_embedding=False)
    grey = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).repeat(1, 3, 8, 8)
    for config, num_different in ((plain, 1), (R, 64)):
        tokens = tokenizer(config).features(grey, layer=1, stage="pre_merge")[0]
        assert len(tokens.mul(1e4).round().unique(dim=0)) == num_different


# ----------------------------------------------------------------------------------- published


@pytest.mark.parametrize(
    ("values", "encoder", "decoder"),
    [
        # Table A1 of the paper: G, G+R (d64) and R; the rest are the other widths published.
        ({"channel_mult": (1, 2, 4, 8), "num_kept": 256}, 62.33, 82.85),
        ({"channel_mult": (1, 1, 2, 4, 8)}, 62.67, 83.37),
        (
            {"channel_mult": (1, 1, 2, 4, 8), "stem": "patch", "num_heads": 12},
            85.68,
            83.37,
        ),
        ({"channels": 32, "channel_mult": (2, 4, 8, 12), "num_kept": 256}, 38.2, 51.4),
        ({"channels": 32, "channel_mult": (2, 2, 4, 8, 12)}, 38.6, 52.0),
        ({"channels": 96, "channel_mult": (1, 1, 2, 4, 8), "num_heads": 12}, 140.9, 187.2),
    ],
    ids=["G", "G+R", "R", "G d32", "G+R d32", "G+R d96"],
)
def test_parameters_are_as_many_as_published(values, encoder, decoder):
    with torch.device("meta"):
        model = Tokenizer(tokenizer_config(image_size=256, **values))
    for part, millions in ((model.encoder, encoder), (model.decoder, decoder)):
        count = sum(parameter.numel() for parameter in part.parameters()) / 1e6
        # As many digits as the number has.
        digits = len(str(millions).split(".")[1])
        assert round(count, digits) == millions


def test_a_codebook_of_any_size_takes_no_memory():
    with torch.device("meta"):
        small, large = (Tokenizer(changed(G, num_bits=bits)).state_dict() for bits in (1, 63))
    assert small.keys() == large.keys()
    assert sum(x.numel() for x in large.values()) < 2 * sum(x.numel() for x in small.values())


# ------------------------------------------------------------------------ sizes and ranges


@VERSIONS
@pytest.mark.parametrize(("height", "width"), [(16, 48), (64, 24), (40, 40)])
def test_other_sizes_run_end_to_end_and_come_back(config, height, width):
    model, image = tokenizer(config), images(1, height, width)
    reconstruction = model.reconstruct(image, source="recovered")
    patch = config.patch_size
    assert reconstruction.encoded.grid_shape == (height // patch, width // patch)
    assert reconstruction.image.shape == image.shape
    assert reconstruction.image.isfinite().all()


def test_without_a_number_tokens_are_kept_in_proportion_to_the_grid():
    model = tokenizer()
    assert model.num_tokens(images(1, 32, 32)) == 20
    assert model.num_tokens(images(1, 64, 32)) == 40
    assert model.encode(images(1, 16, 16)).indices.shape == (1, 5)


def test_a_proportion_is_rounded_to_what_the_layers_reach():
    # Two layers leave at least 13 of 49 cells; a quarter of 49 would be 12.
    model = tokenizer(changed(G, num_layers=2, num_kept=16))
    assert model.num_tokens(images(1, 28, 28)) == 13
    assert model.encode(images(1, 28, 28)).indices.shape == (1, 13)
    assert model(images(1), 16, images(1, 28, 28)).summary.shape == (1, 16)


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(255, 255, "256 x 256"), (300, 200, "304 x 192"), (3, 256, "16 x 256"), (0, 16, "16 x 16")],
)
def test_a_size_that_is_not_legal_is_an_error_before_any_work(height, width, nearest):
    with torch.device("meta"):
        model = Tokenizer(tokenizer_config(image_size=256, channel_mult=(1, 1, 2, 4, 8)))
    image = torch.zeros(1, 3, height, width)
    for use in (model.encode, model.features, model.reconstruct, model.num_tokens):
        with pytest.raises(ValueError, match=rf"\({height} x {width}\).*\(16\)") as caught:
            use(image)
        assert nearest in str(caught.value)
        assert "trained at 256 x 256" in str(caught.value)


@pytest.mark.parametrize("num_kept", [-1, 0, 65])
def test_a_number_of_tokens_that_the_image_has_not_is_an_error(num_kept):
    with pytest.raises(ValueError, match=rf"num_kept \({num_kept}\) must be between 1 and the 64"):
        tokenizer().encode(images(), num_kept)


def test_a_number_of_tokens_below_reach_is_an_error():
    model = tokenizer(changed(G, num_layers=2))
    with pytest.raises(ValueError, match=r"num_kept \(15\) must be at least 16"):
        model.encode(images(), 15)


@pytest.mark.parametrize("num_kept", [9, 41])
def test_a_number_of_tokens_outside_training_warns(num_kept):
    model = tokenizer(dataclasses.replace(G, kept_range=(10, 40)))
    with pytest.warns(UserWarning, match=rf"num_kept \({num_kept}\) is outside the 10 to 40"):
        model.encode(images(), num_kept)


def test_a_number_of_tokens_inside_training_does_not_warn():
    model = tokenizer(dataclasses.replace(G, kept_range=(10, 40)))
    with warnings.catch_warnings(action="error"):
        model.encode(images(), 10)
        model.encode(images(), 40)
        model.encode(images())
        # Merging is off, whatever was trained; other sizes have other numbers.
        model.features(images(), stage="pre_merge")
        model.encode(images(1, 64, 64), 80)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 3, 32, 32), 255.0), r"\(255 to 255\) must be finite and between -1 and 1"),
        (torch.full((1, 3, 32, 32), -2.0), r"\(-2 to -2\) must be finite and between -1 and 1"),
        (torch.full((1, 3, 32, 32), torch.nan), r"\(nan to nan\) must be finite"),
        (torch.full((1, 3, 32, 32), torch.inf), r"\(inf to inf\) must be finite"),
    ],
)
def test_values_out_of_range_are_an_error(image, message):
    model = tokenizer()
    for use in (model.encode, model.features, model.reconstruct):
        with pytest.raises(ValueError, match=message):
            use(image)


def test_bytes_are_an_error_that_says_how_to_convert_them(monkeypatch):
    # As for users, who run without the shape checks that would stop it before.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"dtype torch.uint8 .* image / 127.5 - 1"):
        tokenizer().encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_picture_its_bytes_and_its_tensor_have_the_same_tokens():
    model, picture = tokenizer(), noise(None, 32, 32)
    expected = model.encode(to_tensor(picture)[None], 20)
    for form in (picture, [picture], np.asarray(picture), to_tensor(picture)):
        encoded = model.encode(form, 20)
        assert torch.equal(encoded.latents, expected.latents)
        assert torch.equal(encoded.source.index, expected.source.index)
    features = model.features(picture, stage="pre_merge")
    assert torch.equal(features, model.features(to_tensor(picture)[None], stage="pre_merge"))
    assert torch.equal(model.reconstruct(picture).image, model.reconstruct([picture]).image)


def test_a_tokenizer_is_shown_in_a_few_lines():
    model = tokenizer(dataclasses.replace(G, kept_range=(10, 40)))
    shown = repr(model)
    assert len(shown.splitlines()) == 7
    count = sum(each.numel() for each in model.parameters())
    for part in (
        "32 x 32 pixels, 8 x 8 cells of 4",
        "of 64, trained on (10, 40)",
        "6 bits a token",
    ):
        assert part in shown
    assert f"{count:,} parameters, float32 on cpu" in shown


def test_one_bad_value_is_enough():
    image = images()
    image[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        tokenizer().encode(image)


# ---------------------------------------------------------------- decoding needs what encode gave


@VERSIONS
def test_an_image_is_encoded_alike_alone_and_in_a_batch(config):
    model, batch = tokenizer(config), images(4)
    together = model.encode(batch)
    decoded = model.decode(together.codes, together.source)
    for number in range(4):
        alone = model.encode(batch[number : number + 1])
        assert torch.equal(alone.indices[0], together.indices[number])
        assert torch.equal(alone.source.index[0], together.source.index[number])
        image = model.decode(alone.codes, alone.source)[0]
        torch.testing.assert_close(image, decoded[number], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_indices_and_source_from_disk_decode_to_the_same_image():
    model = tokenizer()
    encoded = model.encode(images(2, 24, 48), num_kept=30)
    tensors = {"indices": encoded.indices, "source": encoded.source.index}
    read = safetensors.torch.load(safetensors.torch.save(tensors))
    image = model.decode(read["indices"], Source(read["source"], 30), (6, 12))
    expected = model.decode(encoded.codes, encoded.source, encoded.grid_shape)
    assert torch.equal(image, expected)


def test_tracking_gradients_changes_no_more_than_rounding():
    # On CPUs training takes other kernels.
    model, image = tokenizer(), images()
    tracked = model.reconstruct(image)
    with torch.no_grad():
        plain = model.reconstruct(image)
    assert torch.equal(tracked.encoded.indices, plain.encoded.indices)
    assert torch.equal(tracked.source.index, plain.source.index)
    torch.testing.assert_close(tracked.image, plain.image, rtol=1e-4, atol=1e-5)


def test_decoding_does_not_depend_on_what_was_encoded_last():
    model = tokenizer()
    first = model.encode(images(), num_kept=20)
    expected = model.decode(first.codes, first.source)
    model.encode(images(3, 64, 16), num_kept=5)
    assert torch.equal(model.decode(first.codes, first.source), expected)


def test_decoding_depends_on_the_source_and_the_grid():
    model = tokenizer()
    encoded = model.encode(images(), num_kept=20)
    codes = torch.randn_like(encoded.codes).sign()
    expected = model.decode(codes, encoded.source)
    other = Source(encoded.source.index.flip(1), 20)
    assert not torch.allclose(model.decode(codes, other), expected)
    assert model.decode(codes, encoded.source, (4, 16)).shape == (2, 3, 16, 64)


@pytest.mark.parametrize(("num_cells", "grid_shape"), [(15, None), (16, (4, 5))])
def test_a_grid_that_does_not_fit_the_source_is_an_error(num_cells, grid_shape):
    source = Source(torch.zeros(1, num_cells, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=rf"must have the {num_cells} cells of the source"):
        tokenizer().decode(torch.ones(1, 1, 6), source, grid_shape)


def test_indices_of_another_tokenizer_are_an_error():
    source = Source(torch.zeros(1, 64, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="tokens of another tokenizer"):
        tokenizer().decode(torch.tensor([[64]]), source)


def test_decoding_unmerges_and_then_runs_the_decoder():
    model = tokenizer()
    encoded = model.encode(images())
    tokens = unmerge(encoded.codes, encoded.source)
    expected = model.decoder(Given(tokens, (8, 8), tokens))
    assert torch.equal(model.decode(encoded.codes, encoded.source), expected)


# -------------------------------------------------------------------------- source recovery


def test_recovery_reads_the_tokens_alone_as_codes_or_indices():
    model = tokenizer()
    encoded = model.encode(images(2, 24, 48), num_kept=30)
    recovered = model.recover(encoded.codes, (6, 12))
    assert recovered.num_kept == 30
    assert torch.equal(recovered.index, model.recover(encoded.indices, (6, 12)).index)
    logits = model.expander.predictor(encoded.codes, (6, 12))
    assert torch.equal(recovered.index, most_likely_source(logits).index)


def test_recovery_assumes_the_trained_grid():
    model = tokenizer()
    assert model.recover(torch.zeros(1, 5, dtype=torch.int64)).index.shape == (1, 64)


def test_a_reconstruction_says_which_source_it_used():
    model, image = tokenizer(), images()
    given, recovered = (model.reconstruct(image, source=kind) for kind in ("given", "recovered"))
    assert torch.equal(given.source.index, given.encoded.source.index)
    assert torch.equal(given.image, model.decode(given.encoded.codes, given.encoded.source))
    expected = model.recover(given.encoded.codes)
    assert torch.equal(recovered.source.index, expected.index)
    assert torch.equal(recovered.image, model.decode(given.encoded.codes, expected))
    assert torch.equal(recovered.encoded.source.index, given.encoded.source.index)


def test_the_asked_share_of_the_predictors_gradient_reaches_the_encoder():
    # In double precision the shares are exact to rounding.
    model, image = tokenizer().double().train(), images().double()
    gradients = []
    for share in (0.0, 0.5, 1.0):
        model.zero_grad(set_to_none=True)
        out = model(image, 20, source_gradient=share)
        out.losses["source"].backward()
        assert all(part.grad is not None for part in model.expander.predictor.parameters())
        gradient = model.encoder.to_latents.weight.grad
        gradients.append(torch.zeros(()) if gradient is None else gradient)
    assert not gradients[0].any()
    assert gradients[2].any()
    torch.testing.assert_close(gradients[1], 0.5 * gradients[2])


def test_images_that_recover_are_decoded_with_the_recovered_source():
    model, image = tokenizer(), images()
    recovers = torch.arange(len(image)) % 2 == 1
    # Latents: an untrained model's codes are all alike, and so are their sources' pictures.
    plain = model(image, 20, quantized=False)
    mixed = model(image, 20, quantized=False, recovers=recovers)
    source = model.recover(mixed.encoded.codes)
    recovered = model.decode(mixed.encoded.latents.tanh(), source)
    assert (plain.reconstruction != recovered).flatten(1).any(1).all()
    assert torch.equal(mixed.reconstruction[recovers], recovered[recovers])
    assert torch.equal(mixed.reconstruction[~recovers], plain.reconstruction[~recovers])
    # What the predictor is taught is the encoder's source, for all of them.
    assert torch.equal(mixed.encoded.source.index, plain.encoded.source.index)
    assert torch.equal(mixed.losses["source"], plain.losses["source"])


def test_the_predictor_knows_cells_and_slots():
    predictor = tokenizer().expander.predictor
    # All codes are equal, so only positions tell cells and slots apart.
    logits = predictor(torch.ones(1, 5, 6), (4, 8))[0]
    assert len(logits.mul(1e5).round().unique(dim=0)) == 32
    assert len(logits.mul(1e5).round().unique(dim=1)[0]) == 5


def test_known_anchors_are_respected():
    model = tokenizer()
    encoded = model.encode(images(), num_kept=20)
    anchors = encoded.source.anchors()
    recovered = model.recover(encoded.codes, anchors=anchors)
    assert torch.equal(recovered.anchors(), anchors)
    # Every other cell has the likeliest of the tokens that are open by then.
    logits = model.expander.predictor(encoded.codes, (8, 8))[1]
    for cell in set(range(64)) - set(anchors[1].tolist()):
        num_open = int((anchors[1] <= cell).sum())
        assert recovered.index[1, cell] == logits[cell, :num_open].argmax()


# ----------------------------------------------------------------------------------- training


@VERSIONS
def test_every_parameter_takes_part_in_a_training_pass(config):
    # In double precision a gradient that cancels is told from a small one. One cancels by design:
    # each channel of a patch is normalised over the image.
    without_effect = {"encoder.stem.0.bias"} if config.stem.kind == "patch" else set()
    model = tokenizer(config).double().train()
    view = images(2, 24, 24).double()
    training_loss(model, images().double(), config.num_kept, view).backward()
    gradients = {name: part.grad for name, part in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    small = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-12}
    assert small == without_effect


@VERSIONS
def test_nothing_is_left_uninitialized(config):
    with uninitialized_memory_is_nan():
        model = Tokenizer(config)
        out = model(images(), config.num_kept, images(2, 24, 24))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert out.reconstruction.isfinite().all()
    assert all(loss.isfinite() for loss in out.losses.values())
    assert out.summary.isfinite().all()


def test_recomputing_activations_changes_no_gradient():
    model, image, view = tokenizer().train(), images(), images(2, 24, 24)
    gradients = []
    for enabled in (False, True):
        model.set_checkpointing(enabled=enabled)
        model.zero_grad()
        training_loss(model, image, view=view).backward()
        gradients.append([part.grad.clone() for part in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


def test_recomputing_activations_keeps_fewer_of_them():
    model, image = tokenizer().train(), images()
    kept = []
    for enabled in (False, True):
        model.set_checkpointing(enabled=enabled)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.numel()), lambda _: None
        ):
            model(image, 20)
        kept.append(sum(saved))
    assert kept[1] < 0.6 * kept[0]


def test_a_view_is_merged_in_proportion_to_its_own_grid():
    model, image, view = tokenizer(), images(), images(2, 24, 24)
    # Half of 64 cells are kept, so half of the view's 36.
    token = model(image, 32, view).summary
    assert torch.equal(token, model.encoder(view, 18).class_token)
    assert not torch.equal(token, model.encoder(view, 32).class_token)
    alone = model(image, 32)
    assert torch.equal(alone.summary, alone.encoded.class_token)


def test_before_quantization_starts_the_decoder_sees_bounded_latents():
    model, image = tokenizer(), images()
    out = model(image, 20, quantized=False)
    expected = model.decode(out.encoded.latents.tanh(), out.encoded.source)
    assert torch.equal(out.reconstruction, expected)
    quantized = model(image, 20)
    assert torch.equal(
        quantized.reconstruction, model.decode(out.encoded.codes, out.encoded.source)
    )
    assert not torch.allclose(quantized.reconstruction, expected)


def test_the_encoder_learns_through_the_quantizer_and_without_it():
    for quantized in (True, False):
        model, image = tokenizer(), images()
        (model(image, 20, quantized=quantized).reconstruction - image).abs().mean().backward()
        assert model.encoder.to_latents.weight.grad.abs().max() > 0


def test_a_training_pass_equals_encoding_and_decoding():
    model, image = tokenizer(), images()
    out, encoded = model(image, 20), model.encode(image, 20)
    assert torch.equal(out.encoded.indices, encoded.indices)
    assert torch.equal(out.reconstruction, model.decode(encoded.codes, encoded.source))


def test_a_batch_of_one_trains():
    model = tokenizer().train()
    training_loss(model, images(1), view=images(1, 24, 24)).backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())


# ---------------------------------------------------------------------------------- precision


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "image_dtype",
    [
        torch.float32,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.bfloat16, torch.float16)),
    ],
)
def test_a_model_in_low_precision_runs_end_to_end(config, dtype, image_dtype):
    model, image = tokenizer(config).to(dtype), images().to(image_dtype)
    encoded = model.encode(image)
    assert encoded.codes.abs().eq(1).all()
    assert torch.equal(quantize(encoded.latents.float()).indices, encoded.indices)
    decoded = model.decode(encoded.indices, encoded.source)
    assert decoded.dtype == dtype
    assert decoded.isfinite().all()
    torch.testing.assert_close(model.decode(encoded.codes.float(), encoded.source), decoded)
    source = model.recover(encoded.indices)
    assert torch.equal(model.recover(encoded.codes.float()).index, source.index)
    assert model.features(image, pool="size_weighted_mean").isfinite().all()


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_pass_under_autocast_is_finite(config, dtype):
    model = tokenizer(config).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = training_loss(model, images(), config.num_kept, images(2, 24, 24))
        codes = model(images(), config.num_kept).encoded.codes
    loss.backward()
    assert codes.abs().eq(1).all()
    assert all(part.grad.isfinite().all() for part in model.parameters())


# -------------------------------------------------------------------------------------- files


def test_a_saved_tokenizer_is_the_same_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was touched")

    model, image = tokenizer(dataclasses.replace(R, kept_range=(10, 64))), images()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    expected, encoded = model.encode(image), loaded.encode(image)
    assert torch.equal(encoded.indices, expected.indices)
    assert torch.equal(encoded.source.index, expected.source.index)
    decoded = loaded.decode(encoded.indices, encoded.source)
    assert torch.equal(decoded, model.decode(expected.indices, expected.source))


def test_weights_of_another_architecture_are_an_error(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    other = tokenizer(changed(G, num_bits=7))
    weights = tmp_path / "model" / "model.safetensors"
    safetensors.torch.save_file(other.state_dict(), weights)
    with pytest.raises(ValueError, match=r"damaged or replaced"):
        Tokenizer.from_pretrained(tmp_path / "model")


# -------------------------------------------------------------------------------- broken weights


@pytest.mark.parametrize("name", ["to_latents.bias", "reducer.blocks.0.mlp.fc1.weight"])
def test_latents_that_are_not_finite_are_no_codes(name):
    model = tokenizer()
    with torch.no_grad():
        model.encoder.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(RuntimeError, match="latents are not finite: the tokenizer's weights"):
        model.encode(images())


def test_a_source_is_not_recovered_from_logits_that_are_not_finite():
    model = tokenizer()
    encoded = model.encode(images())
    with torch.no_grad():
        model.expander.predictor.to_query.bias[0] = torch.nan
    for anchors in (None, torch.arange(20).expand(2, -1)):
        with pytest.raises(RuntimeError, match="source predictor's logits are not finite"):
            model.recover(encoded.codes, anchors=anchors)


# ---------------------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision") / "model"
    torch.manual_seed(0)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_loaded_tokenizer_computes_in_the_precision_asked_for(saved):
    exact = Tokenizer.from_pretrained(saved, precision="float32")
    half = Tokenizer.from_pretrained(saved, precision="bf16")
    image = images()
    with torch.no_grad():
        expected = exact.encode(image)
        found = half.encode(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = exact.encode(image)
            decoded = exact.decode(expected.codes, expected.source)
    # Channels in another order are summed in another order.
    torch.testing.assert_close(found.latents, rounded.latents.float(), rtol=0.1, atol=0.1)
    assert not torch.equal(found.latents, expected.latents)
    # Results are in the type of the weights, and parts that need no bits keep it.
    for name in ("codes", "latents", "class_token"):
        assert getattr(found, name).dtype == torch.float32
    again = half.decode(expected.codes, expected.source)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, decoded.float(), rtol=0.1, atol=0.1)
    assert half.features(image).dtype == torch.float32


def test_most_signs_are_those_of_float32_and_the_others_are_of_latents_near_zero(saved):
    exact = Tokenizer.from_pretrained(saved, precision="float32")
    half = Tokenizer.from_pretrained(saved, precision="bf16")
    image = images(8)
    with torch.no_grad():
        # Without merging, which may take another pair where two are alike.
        expected, found = (model.encode(image, 64) for model in (exact, half))
    differ = expected.codes != found.codes
    assert differ.float().mean() < 0.05
    assert (expected.latents.abs()[differ] < 0.2 * expected.latents.std()).all()


def test_float32_is_what_a_call_without_autocast_gives_and_auto_follows_the_device(
    saved, monkeypatch
):
    image = images()
    exact = Tokenizer.from_pretrained(saved, precision="float32")
    plain = tokenizer()
    plain.load_state_dict(exact.state_dict())
    assert torch.equal(exact.encode(image).latents, plain.encode(image).latents)
    auto = Tokenizer.from_pretrained(saved)
    for has_bf16, expected in ((True, torch.bfloat16), (False, None)):
        capabilities = {"avx512_bf16": has_bf16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known)
        assert auto.computes_in() is expected
