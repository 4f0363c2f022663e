"""Features of images: their stages, pools and layers."""

import itertools

import pytest
import torch
from torch import nn

from mergevq.data.layouts import merge, unmerge
from mergevq.tokenizer.bits import quantize
from mergevq.tokenizer.features import pool_features, require_stage, run_layers
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import changed
from tests.support.tokenizer import G

G_R = changed(G, channel_mult=(2, 2, 2, 4), num_kept=9)
R = changed(G, stem="patch", patch_dim=32, position_embedding=True)


def tokenizer(config=G):
    """Random weights large enough that every part shows in the output."""
    model = Tokenizer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(batch=2, height=32, width=32):
    return torch.rand(batch, 3, height, width) * 2 - 1


def test_several_features_come_from_one_pass():
    model, image = tokenizer(), images()
    out = run_layers(model, image, 20)
    for stage, pool in (
        ("merged", "mean"),
        ("latents", "none"),
        ("unmerged", "size_weighted_mean"),
    ):
        found = pool_features(model.encoder, model.quantizer, out, stage, pool)
        assert torch.equal(found, model.features(image, num_kept=20, stage=stage, pool=pool))


def test_codes_are_of_the_last_block_alone():
    require_stage("quantized", 6, 6)
    require_stage("merged", 2, 6)
    with pytest.raises(ValueError, match=r"layer \(5\) must be 6 or None for stage 'latents'"):
        require_stage("latents", 5, 6)


# Only the last layer is quantized.
STAGES_AND_LAYERS = [
    *itertools.product(["pre_merge", "merged", "unmerged"], [None, 0, 3]),
    *itertools.product(["latents", "quantized"], [None, 6]),
]


@pytest.mark.parametrize(
    "config", [G_R, *(pytest.param(config, marks=pytest.mark.slow) for config in (G, R))]
)
@pytest.mark.parametrize("pool", ["none", "class", "mean", "size_weighted_mean"])
@pytest.mark.parametrize(("stage", "layer"), STAGES_AND_LAYERS)
def test_features_of_every_kind_have_the_stated_shape(config, stage, pool, layer):
    num_kept = config.num_kept
    counts = merge_schedule(config.num_tokens, num_kept, config.reducer.num_layers)
    left = config.num_tokens - sum(counts[:layer])
    num_tokens = {
        "pre_merge": config.num_tokens,
        "merged": left,
        "latents": num_kept,
        "quantized": num_kept,
        "unmerged": config.num_tokens,
    }[stage]
    projected = stage in {"latents", "quantized"} and pool != "class"
    dim = config.quantizer.dim if projected else config.dim
    shape = (2, num_tokens, dim) if pool == "none" else (2, dim)
    features = tokenizer(config).features(images(), layer=layer, stage=stage, pool=pool)
    assert features.shape == shape
    assert features.isfinite().all()


def test_features_differ_between_stages_pools_and_layers():
    model, image = tokenizer(), images()
    kinds = [
        {"stage": "pre_merge", "pool": "mean"},
        {"stage": "merged", "pool": "mean"},
        {"stage": "unmerged", "pool": "mean"},
        {"stage": "pre_merge", "pool": "class"},
        {"stage": "merged", "pool": "class"},
        {"stage": "merged", "pool": "mean", "layer": 5},
        {"stage": "merged", "pool": "mean", "num_kept": 40},
    ]
    values = torch.stack([model.features(image, **kind) for kind in kinds])
    distances = torch.cdist(values.flatten(1), values.flatten(1)) + torch.eye(len(kinds))
    assert distances.min() > 1e-4


def test_features_are_those_of_the_encoder():
    model, image = tokenizer(), images()
    encoded = model.encode(image, 20)
    assert torch.equal(model.features(image, num_kept=20, pool="class"), encoded.class_token)
    quantized = model.features(image, num_kept=20, stage="quantized")
    # Features are in the order of the matching, tokens in canonical order.
    order = quantize(quantized).indices.sort().values
    assert torch.equal(order, encoded.indices.sort().values)
    latents = model.features(image, num_kept=20, stage="latents")
    assert torch.equal(quantize(latents).codes, quantized)
    torch.testing.assert_close(latents.sum(1), encoded.latents.sum(1))
    unmerged = model.features(image, num_kept=20, stage="unmerged")
    means = unmerge(merge(unmerged, encoded.source), encoded.source)
    torch.testing.assert_close(unmerged, means)


def test_the_mean_by_size_is_the_mean_over_cells():
    model, image = tokenizer(), images()
    weighted = model.features(image, pool="size_weighted_mean")
    unmerged = model.features(image, stage="unmerged", pool="mean")
    torch.testing.assert_close(weighted, unmerged)
    assert not torch.allclose(weighted, model.features(image, pool="mean"))


def test_features_before_the_first_layer_are_the_stems():
    model, image = tokenizer(), images()
    stem = model.encoder.stem(image).flatten(2).mT
    for stage in ("pre_merge", "merged", "unmerged"):
        assert torch.equal(model.features(image, layer=0, stage=stage), stem)


def test_features_of_a_layer_that_does_not_exist_are_an_error():
    for layer in (-1, 7):
        with pytest.raises(ValueError, match=rf"layer \({layer}\) must be between 0 and the 6"):
            tokenizer().features(images(), layer=layer)
    for stage in ("latents", "quantized"):
        with pytest.raises(ValueError, match=rf"layer \(3\) must be 6 or None for stage '{stage}'"):
            tokenizer().features(images(), layer=3, stage=stage)
