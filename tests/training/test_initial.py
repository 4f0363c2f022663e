import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.config.objective import NoTeacher
from mergevq.config.parts import PatchDecoder
from mergevq.config.recipes.digits import digits32_global_map
from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.config.training import DataConfig, TokenizerRun
from mergevq.data.images import open_images
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import load_model, tokens_hash
from mergevq.tokenizer.analytic.components import encode_analytic, fit_components
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.initial import find_start, initial_tokenizer, initialize_from
from mergevq.training.tokenizer import run_batches, train
from mergevq.training.tokenizer_step import build
from tests.support.parts import changed
from tests.support.small import shrink

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("reducer.num_heads", 4, 2),
        ("decoder.num_heads", 4, 2),
        ("expander.num_heads", 4, 2),
        ("reducer.shape", "square", "linear"),
        ("stem.position_embedding", True, False),
        ("reducer.norm_eps", 1e-05, 1e-06),
        ("decoder.norm_eps", 1e-05, 1e-06),
        ("decoder.kind", "patch", "cnn"),
    ],
)
def test_starting_from_another_architecture_is_refused_where_shapes_agree(
    tmp_path, name, value, needed
):
    run = shrink(tiny64_gr())
    Tokenizer(run.model).save_pretrained(tmp_path)
    part, field = name.split(".")
    other = getattr(run.model, part)
    is_kind = field == "kind"
    other = PatchDecoder(width=16, num_heads=2) if is_kind else replace(other, **{field: value})
    mine = Tokenizer(replace(run.model, **{part: other}))
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ValueError, match=rf"model.{name} \({value}\) must be {needed}[;,]"):
        initialize_from(mine, tmp_path)
    after = mine.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_all_settings_that_differ_are_named_at_once_but_free_ones(tmp_path):
    run = shrink(tiny64_gr())
    other = changed(run.model, num_bits=7, num_layers=4, image_size=64, num_kept=100)
    Tokenizer(changed(other, layer_scale=0.5)).save_pretrained(tmp_path)
    message = (
        r"^model.reducer.num_layers \(3\) must be 4; model.quantizer.num_bits \(18\) must be 7, as "
        "in the tokenizer of init_from"
    )
    with pytest.raises(ValueError, match=message):
        initialize_from(Tokenizer(run.model), tmp_path)


def test_weights_with_an_embedding_for_each_cell_keep_their_image_size(tmp_path):
    model = shrink(digits32_global_map()).model
    Tokenizer(model).save_pretrained(tmp_path)
    more = replace(model, num_kept=24, reducer=replace(model.reducer, exploration=0.0))
    initialize_from(Tokenizer(more), tmp_path)
    with pytest.raises(
        ValueError, match=r"model.image_size \(64\) must be 32, as in the tokenizer"
    ):
        initialize_from(Tokenizer(replace(model, image_size=64)), tmp_path)


# ---------------------------------------------------------------------------- from components


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Smooth pictures in a folder, of the size of a small run."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(30):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.png")
    return folder


def analytic_run(pictures, **values) -> TokenizerRun:
    """A small run that starts from components."""
    run = shrink(tiny64_gr())
    model = changed(
        run.model,
        stem="patch",
        patch_dim=96,
        patch_norm=False,
        decoder="patch",
        decoder_width=16,
        decoder_blocks="ca",
        num_bits=12,
    )
    return replace(
        run,
        model=model,
        init_codes="components",
        data=DataConfig(path=str(pictures), val_fraction=0.2, num_workers=0),
        teacher=NoTeacher(),
        loss=replace(run.loss, adversarial_weight=0.0, perceptual_weight=0.0),
        train=replace(run.train, precision="float32", device="cpu"),
        **values,
    )


def test_components_are_fitted_to_evenly_spaced_images_and_to_each_of_their_patches(pictures):
    run, images = analytic_run(pictures), open_images(str(pictures))
    start = find_start(run, images, max_images=10)
    assert start is not None
    assert start.num_images == 10
    pixels = [torch.from_numpy(np.array(images.read(number))) for number in range(0, 30, 3)]
    image = torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    expected = fit_components(image, 4, 12)
    assert start.components.bits == expected.bits
    torch.testing.assert_close(start.components.basis, expected.basis)
    torch.testing.assert_close(start.components.levels, expected.levels)


def test_of_many_patches_every_so_manieth_is_taken_wherever_batches_are_cut(pictures, monkeypatch):
    run, images = analytic_run(pictures), open_images(str(pictures))
    found = []
    for batch_size in (3, 7, 64):
        monkeypatch.setattr("mergevq.training.initial._BATCH", batch_size)
        monkeypatch.setattr("mergevq.training.initial.NUM_FITTED", 150)
        found.append(find_start(run, images).components)
    for other in found[1:]:
        assert other.bits == found[0].bits
        assert torch.equal(other.basis, found[0].basis)


def test_a_run_starts_at_the_analytic_tokenizer(pictures):
    run, images = analytic_run(pictures), open_images(str(pictures))
    start = find_start(run, images)
    state = build(run, WORLD, num_classes=0, start=start).state
    image = torch.rand(2, 3, 32, 32) - 0.5
    with torch.no_grad():
        encoded = state.tokenizer.eval().encode(image, 24)
    analytic = encode_analytic(start.components, image, 24, 3)
    assert (encoded.codes == analytic.codes).float().mean() > 0.99
    # Averages begin there too, not at random weights.
    conv = "encoder.stem.conv.weight"
    assert torch.equal(state.ema.shadow[conv], state.tokenizer.state_dict()[conv])


def test_a_run_that_starts_from_components_needs_them(pictures):
    with pytest.raises(ValueError, match=r"init_codes \(components\) needs components"):
        initial_tokenizer(analytic_run(pictures))


def test_a_cnn_decoder_has_random_weights_all_the_same(pictures):
    run, images = analytic_run(pictures), open_images(str(pictures))
    run = replace(run, model=changed(run.model, decoder="cnn"))
    tokenizer = initial_tokenizer(run, find_start(run, images))
    assert tokenizer.config.decoder == run.model.decoder
    assert tokenizer.reconstruct(torch.zeros(1, 3, 32, 32), 24).image.shape == (1, 3, 32, 32)


def test_training_says_its_start_saves_it_resumes_and_can_be_gone_on_from(
    pictures, tmp_path, capfd
):
    run = analytic_run(pictures, out=str(tmp_path / "run"))
    model = train(run)
    said = "codes start as 12 bits of"
    assert said in capfd.readouterr().err
    saved = json.loads((model / "config.json").read_text())["config"]["decoder"]
    assert len(saved["bit_components"]) == 12
    train(replace(run, train=replace(run.train, num_steps=3)), resume=True)
    assert said not in capfd.readouterr().err
    tokenizer = Tokenizer.from_pretrained(model)
    # The components of its bits come with the weights.
    onwards = replace(run, init_codes="random", init_from=str(model), out=str(tmp_path / "more"))
    again = initial_tokenizer(onwards)
    assert again.config == tokenizer.config
    wrong = replace(onwards, model=changed(run.model, bit_components=(0, 1, 2) * 4))
    with pytest.raises(ValueError, match=r"model.decoder.bit_components \(.*\) must be "):
        initial_tokenizer(wrong)


def test_a_stem_with_norm_is_not_that_of_one_without(pictures, tmp_path):
    run = analytic_run(pictures)
    Tokenizer(run.model).save_pretrained(tmp_path)
    mine = Tokenizer(changed(run.model, patch_norm=True))
    with pytest.raises(ValueError, match=r"model.stem.norm \(True\) must be False, as in the tok"):
        initialize_from(mine, tmp_path)


def test_an_encoder_without_a_rate_stays_and_with_it_every_token(pictures, tmp_path):
    run = analytic_run(pictures, encoder_lr_ratio=0.0)
    first = train(replace(run, out=str(tmp_path / "first")))
    again = replace(run, init_codes="random", init_from=str(first), out=str(tmp_path / "second"))
    second = train(again)
    assert tokens_hash(first) == tokens_hash(second)
    one, two = (load_model(path, "tokenizer").state for path in (first, second))
    for name, weight in one.items():
        assert torch.equal(weight, two[name]) or not name.startswith("encoder."), name
    assert not torch.equal(one["decoder.conv_out.weight"], two["decoder.conv_out.weight"])


def test_the_encoder_moves_at_its_share_of_the_rate(pictures):
    run, images = analytic_run(pictures, encoder_lr_ratio=0.25), open_images(str(pictures))
    run = replace(run, optim=replace(run.optim, lr=1e-3, warmup_steps=0, clip_norm=None))
    learner = build(run, WORLD, num_classes=0, start=find_start(run, images))
    state = learner.state
    before = {name: weight.clone() for name, weight in state.tokenizer.state_dict().items()}
    learner.step(next(run_batches(run, WORLD, images, 0)))
    after = state.tokenizer.state_dict()
    # Adam's first step is the rate itself wherever there is a gradient to speak of.
    for name, rate in (("encoder.to_latents.weight", 2.5e-4), ("decoder.to_half.bias", 0.0)):
        moved = (after[name] - before[name]).abs().max()
        assert float(moved) == pytest.approx(rate, rel=1e-2)
    moved = (after["decoder.conv_out.weight"] - before["decoder.conv_out.weight"]).abs().max()
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)
