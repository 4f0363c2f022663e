"""Fine-tuning: rates by hand, mixing by hand, and sixteen images learnt by heart."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mergevq.config.probing import FinetuneConfig
from mergevq.data.images import open_images
from mergevq.evaluate.probe.finetune import (
    Classifier,
    DropPath,
    Mixed,
    classify,
    cutmix,
    draw_beta,
    finetune,
    layer_decay_groups,
    mix,
    mixup,
    num_steps,
)
from mergevq.runtime.optim import check_coverage
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.probes import CONFIG, tiny_tokenizer, write_colours

PLAIN = FinetuneConfig(
    num_epochs=40,
    batch_size=20,
    rate=0.3,
    layer_decay=0.9,
    warmup_fraction=0.1,
    label_smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    augmentation="none",
    randaugment=0.0,
    erasing=0.0,
    drop_path=0.0,
    precision="float32",
)


def classifier(generator, *, stage="merged", pool="mean", num_kept=20, num_classes=3):
    return Classifier(
        tiny_tokenizer(),
        num_classes,
        num_kept=num_kept,
        stage=stage,
        pool=pool,
        generator=generator,
    )


def batch(count=4):
    target = torch.eye(count)
    return Mixed(torch.rand(count, 3, 8, 8) * 2 - 1, target)


# ------------------------------------------------------------------------------- layer decay


@pytest.mark.parametrize(("stage", "pool"), [("merged", "mean"), ("quantized", "mean")])
def test_rates_decay_from_the_classifier_to_the_stem(generator, stage, pool):
    model = classifier(generator, stage=stage, pool=pool)
    groups = layer_decay_groups(model, 0.05, 0.5)
    scale = {parameter: group["scale"] for group in groups for parameter in group["params"]}
    encoder = model.tokenizer.encoder
    # Four blocks: the classifier is at 1, block 4 at 1/2, .. block 1 at 1/16, the stem at 1/32.
    assert scale[model.weight] == scale[model.norm.bias] == 1
    for number, expected in ((3, 1 / 2), (2, 1 / 4), (1, 1 / 8), (0, 1 / 16)):
        assert {scale[each] for each in encoder.reducer.blocks[number].parameters()} == {expected}
    assert {scale[each] for each in encoder.stem.parameters()} == {1 / 32}
    assert scale[encoder.class_token] == 1 / 32
    assert (encoder.to_latents.weight in scale) == (stage == "quantized")
    assert scale.get(encoder.to_latents.weight, 1) == 1
    check_coverage([model], [torch.optim.AdamW(groups)])
    decay = {each: group["weight_decay"] for group in groups for each in group["params"]}
    assert decay[model.weight] == 0.05
    assert decay[model.bias] == decay[encoder.class_token] == 0


def test_the_rates_are_those_of_simmims_base_model():
    config = FinetuneConfig()
    assert (config.rate, config.layer_decay, config.weight_decay) == (1.25e-3, 0.65, 0.05)
    assert (config.randaugment, config.erasing, config.drop_path) == (9, 0.25, 0.1)


@pytest.mark.parametrize("stage", ["merged", "latents", "quantized", "unmerged"])
@pytest.mark.parametrize("pool", ["class", "mean", "size_weighted_mean"])
def test_every_parameter_that_is_trained_gets_a_gradient(generator, stage, pool):
    model = classifier(generator, stage=stage, pool=pool)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
    assert not any(each.requires_grad for each in model.tokenizer.decoder.parameters())


# ----------------------------------------------------------------------------------- mixing


def test_mixing_with_a_share_of_1_changes_nothing():
    mixed, order = batch(), torch.tensor([1, 2, 3, 0])
    for result in (mixup(mixed, 1.0, order), cutmix(mixed, 1.0, order, (0.5, 0.5))):
        assert torch.equal(result.image, mixed.image)
        assert torch.equal(result.target, mixed.target)


def test_mixup_blends_images_and_targets_by_hand():
    mixed, order = batch(2), torch.tensor([1, 0])
    result = mixup(mixed, 0.75, order)
    torch.testing.assert_close(result.image[0], 0.75 * mixed.image[0] + 0.25 * mixed.image[1])
    assert result.target.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_cutmix_counts_the_pixels_that_are_pasted():
    mixed, order = batch(2), torch.tensor([1, 0])
    # A quarter of the area is a square of half the side: 4 of 8 pixels, all inside the image.
    inside = cutmix(mixed, 0.75, order, (0.5, 0.5))
    assert torch.equal(inside.image[0, :, 2:6, 2:6], mixed.image[1, :, 2:6, 2:6])
    assert torch.equal(inside.image[0, :, :2], mixed.image[0, :, :2])
    assert inside.target.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    # At the corner only 2 x 2 of its 64 pixels are.
    corner = cutmix(mixed, 0.75, order, (0.0, 0.0))
    assert corner.target.tolist() == [[0.9375, 0.0625], [0.0625, 0.9375]]
    everything = cutmix(mixed, 0.0, order, (0.5, 0.5))
    assert torch.equal(everything.image, mixed.image[order])


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_are_drawn_from_the_distribution_that_is_set(name):
    off = {"mixup": 0.0, "cutmix": 0.0}
    spread = {}
    for alpha in (0.05, 50.0):
        config = FinetuneConfig(**off | {name: alpha})
        kept = [
            mix(batch(), config, torch.Generator().manual_seed(seed)).target.max(1).values[0]
            for seed in range(60)
        ]
        spread[alpha] = float(torch.stack(kept).mean())
    # A small parameter leaves an image alone or replaces it; a large one takes half of each.
    assert spread[0.05] > spread[50.0] + 0.1


def test_mixing_follows_the_settings(generator):
    mixed = batch()
    off, only_mixup, both = (
        FinetuneConfig(mixup=0.0, cutmix=0.0),
        FinetuneConfig(cutmix=0.0),
        FinetuneConfig(),
    )
    assert mix(mixed, off, generator) is mixed
    for config in (only_mixup, both):
        result = mix(mixed, config, generator)
        torch.testing.assert_close(result.target.sum(1), torch.ones(4))
        assert result.image.abs().max() <= 1
    first, again = (mix(mixed, both, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.image, again.image)


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 2.0, 50.0])
def test_shares_have_the_mean_and_variance_of_the_beta_distribution(generator, alpha):
    draws = torch.tensor([draw_beta(alpha, generator) for _ in range(1000)])
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean() == pytest.approx(0.5, abs=0.04)
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


# --------------------------------------------------------------------------- dropped blocks


def test_blocks_are_skipped_more_often_the_later_they_come():
    depth = DropPath(tiny_tokenizer().encoder, 0.3)
    assert depth.probabilities == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_skipped_block_changes_nothing_and_others_count_for_more(generator):
    encoder = tiny_tokenizer().encoder.train()
    image = torch.rand(64, 3, 16, 16) * 2 - 1
    plain = encoder(image, CONFIG.num_tokens, 1).tokens
    before = encoder(image, CONFIG.num_tokens, 0).tokens
    depth = DropPath(encoder, 0.5)
    depth.probabilities = [0.5] * len(encoder.reducer.blocks)
    with depth:
        depth.draw(64, generator, torch.device("cpu"))
        random = encoder(image, CONFIG.num_tokens, 1).tokens
        encoder.eval()
        assert torch.equal(encoder(image, CONFIG.num_tokens, 1).tokens, plain)
        encoder.train()
    same = torch.tensor([torch.equal(a, b) for a, b in zip(random, before, strict=True)])
    # Attention and MLP are drawn apart: both are skipped for a quarter of the images.
    assert 6 <= same.sum() <= 26
    assert torch.equal(encoder(image, CONFIG.num_tokens, 1).tokens, plain)


def test_what_is_not_skipped_is_divided_by_its_probability(generator):
    encoder = tiny_tokenizer().encoder.train()
    block = encoder.reducer.blocks[3]
    x = torch.randn(1000, 2, CONFIG.dim)
    with DropPath(encoder, 0.25) as depth:
        depth.draw(1000, generator, torch.device("cpu"))
        factors = (block.ls2(x) / (x * block.ls2.gamma))[:, 0, 0]
        assert torch.equal(
            encoder.reducer.blocks[0].ls1(x), x * encoder.reducer.blocks[0].ls1.gamma
        )
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 4 / 3))
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)


# --------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_sixteen_images_are_learnt_by_heart_whatever_their_labels(tmp_path, generator):
    labels = torch.randint(2, (16,), generator=generator)
    for number, label in enumerate(labels.tolist()):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST)
        image.save(tmp_path / str(label) / f"{number:02d}.png")
    images = open_images(str(tmp_path))
    model = Classifier(
        Tokenizer(CONFIG), 2, num_kept=20, stage="merged", pool="mean", generator=generator
    )
    assert num_steps(16, PLAIN) == 40
    result = finetune(model, images, images, PLAIN, num_workers=0)
    assert (result.scores.argmax(1) == result.label).all()
    assert len(result.losses) == 40
    assert result.losses[-1] < 0.2 < result.losses[0]
    assert result.rate == pytest.approx(0.3 * 16 / 512)


@pytest.mark.slow
def test_fine_tuning_is_the_same_for_the_same_seed(tmp_path):
    images = open_images(str(write_colours(tmp_path, 3)))
    config = FinetuneConfig(num_epochs=2, batch_size=4, precision="float32")

    def scores(seed):
        torch.manual_seed(0)
        model = classifier(torch.Generator().manual_seed(seed))
        return finetune(model, images, images, config, num_workers=0, seed=seed).scores

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


@pytest.mark.parametrize(
    "changed",
    [
        {"randaugment": 9.0},
        *(
            pytest.param(changed, marks=pytest.mark.slow)
            for changed in (
                {"randaugment": 9.0, "augmentation": "resized_crop"},
                {"erasing": 1.0},
                {"drop_path": 0.5},
            )
        ),
    ],
    ids="-".join,
)
def test_each_augmentation_changes_what_is_learnt(tmp_path, changed):
    images = open_images(str(write_colours(tmp_path, 3)))
    short = replace(PLAIN, num_epochs=2)

    def losses(config):
        torch.manual_seed(0)
        model = classifier(torch.Generator().manual_seed(1))
        return finetune(model, images, images, config, num_workers=0).losses

    # The crop draws too, so it is compared with itself.
    plain = replace(short, augmentation=changed.get("augmentation", "none"))
    assert losses(replace(short, **changed)) != losses(plain)
    assert losses(plain) == losses(plain)


def test_a_step_moves_the_encoder_and_leaves_the_decoder(tmp_path, generator):
    images = open_images(str(write_colours(tmp_path, 2)))
    model = classifier(generator, num_kept=CONFIG.num_tokens)
    before = {name: each.clone() for name, each in model.named_parameters()}
    config = FinetuneConfig(num_epochs=1, batch_size=6, augmentation="crop", precision="float32")
    finetune(model, images, images, config, num_workers=0)
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {"weight", "bias", "tokenizer.encoder.class_token"} <= moved
    assert not any(name.startswith(("tokenizer.decoder", "tokenizer.source")) for name in moved)


def test_classification_depends_on_the_image_alone(tmp_path, generator):
    images = open_images(str(write_colours(tmp_path, 3)))
    model = classifier(generator).train()
    together, label = classify(model, images, batch_size=9, num_workers=0)
    apart, _ = classify(model, images, batch_size=2, num_workers=0)
    assert not model.training
    assert label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(together, apart)
