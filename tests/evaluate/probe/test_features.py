"""Features: which ones there are, that they are the tokenizer's, and the baselines."""

import pytest
import torch
from torch import nn

from mergevq.config.probing import FeatureConfig
from mergevq.data.batches import Batch
from mergevq.evaluate.probe.features import (
    PIXELS,
    extract,
    feature_kinds,
    fit_pca,
    require_labels,
    shrunk_pixels,
)
from mergevq.tokenizer.features import run_layers
from tests.support.probes import CONFIG, tiny_tokenizer

ALL = FeatureConfig(
    num_kept=(9,),
    stages=("pre_merge", "merged", "unmerged", "latents", "quantized"),
    pools=("class", "mean", "size_weighted_mean"),
    layers=(0, 2, 4),
)


def batches(sizes=(3, 2), label=None):
    made, first = [], 0
    for size in sizes:
        image = torch.rand(size, 3, 16, 16) * 2 - 1
        labels = torch.arange(first, first + size) % 2 if label is None else label
        made.append(Batch(image, labels, None, None, torch.arange(first, first + size)))
        first += size
    return made


def test_features_are_those_the_tokenizer_gives():
    model, data = tiny_tokenizer(), batches()
    kinds = feature_kinds(model, ALL)
    found = extract(model, data, kinds, pixel_side=16)
    image = torch.cat([batch.image for batch in data])
    assert [*found.features] == [kind.name for kind in kinds] + [PIXELS]
    for kind in kinds:
        expected = model.features(
            image, num_kept=kind.num_kept, layer=kind.layer, stage=kind.stage, pool=kind.pool
        )
        torch.testing.assert_close(found.features[kind.name], expected)
    assert torch.equal(found.features[PIXELS], image.flatten(1))
    assert found.label.tolist() == [0, 1, 0, 1, 0]
    assert found.index.tolist() == [0, 1, 2, 3, 4]


def test_no_two_of_the_features_are_the_same():
    model = tiny_tokenizer()
    kinds = feature_kinds(model, ALL)
    assert len({kind.name for kind in kinds}) == len(kinds)
    features = extract(model, batches(), kinds, pixel_side=16).features
    # Before the first block nothing has been merged, whatever K.
    kept = [kind for kind in kinds if kind.layer > 0]
    for dim in (CONFIG.dim, CONFIG.quantizer.dim):
        values = [features[kind.name] for kind in kept if features[kind.name].shape[1] == dim]
        flat = torch.stack(values).flatten(1)
        assert (torch.cdist(flat, flat) + torch.eye(len(flat))).min() > 1e-4


def test_by_default_the_nominal_tokens_and_no_merging_are_probed():
    names = [kind.name for kind in feature_kinds(tiny_tokenizer(), FeatureConfig())]
    assert names == [
        "20 tokens, class token",
        "20 tokens, merged, mean",
        "20 tokens, quantized, mean",
        "64 tokens (no merging), class token",
        "64 tokens (no merging), mean",
        "64 tokens (no merging), quantized, mean",
    ]


def test_the_mean_by_size_of_merged_tokens_is_the_mean_of_the_grid():
    model = tiny_tokenizer()
    config = FeatureConfig(stages=("merged",), pools=("size_weighted_mean",), layers=(3,))
    found = extract(model, batches((4,)), feature_kinds(model, config), pixel_side=16)
    torch.manual_seed(0)
    model, (batch,) = tiny_tokenizer(), batches((4,))
    out = run_layers(model, batch.image, 20, 3)
    sizes = out.layout.sizes()
    assert sizes.max() > 1
    weighted = (out.tokens * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)
    grid = out.tokens.gather(1, out.layout.index[..., None].expand(-1, -1, CONFIG.dim))
    feature = found.features["20 tokens, merged, size weighted mean, layer 3"]
    torch.testing.assert_close(feature, weighted)
    torch.testing.assert_close(feature, grid.mean(1))
    assert not torch.allclose(feature, out.tokens.mean(1))


def test_the_class_token_is_not_pooled_from_tokens():
    model = tiny_tokenizer()
    (batch,) = batches((3,))
    out = run_layers(model, batch.image, 20)
    found = extract(model, [batch], feature_kinds(model, FeatureConfig()), pixel_side=16)
    torch.testing.assert_close(found.features["20 tokens, class token"], out.class_token)
    torch.testing.assert_close(
        found.features["20 tokens, class token"], model.encode(batch.image).class_token
    )


def test_features_that_are_not_finite_are_an_error_that_names_the_stage():
    model = tiny_tokenizer()
    nn.init.constant_(model.encoder.to_latents.bias, torch.nan)
    kinds = feature_kinds(model, FeatureConfig())
    with pytest.raises(ValueError, match=r"features at stage quantized .*item 0 is not finite"):
        extract(model, batches(), kinds, pixel_side=16)


def test_an_impossible_number_of_tokens_or_layer_is_an_error():
    with pytest.raises(ValueError, match=r"tokens \(65\) must be at most the 64 cells"):
        feature_kinds(tiny_tokenizer(), FeatureConfig(num_kept=(65,)))
    with pytest.raises(ValueError, match=r"num_kept \(3\) must be at least 4"):
        feature_kinds(tiny_tokenizer(), FeatureConfig(num_kept=(3,)))
    with pytest.raises(ValueError, match=r"layer \(5\) must be between 0 and the 4 blocks"):
        feature_kinds(tiny_tokenizer(), FeatureConfig(layers=(5,)))


def test_images_without_labels_or_of_one_class_are_errors():
    with pytest.raises(ValueError, match=r"2 of 3 images of here have no label"):
        require_labels(torch.tensor([-1, 0, -1]), "here")
    with pytest.raises(ValueError, match=r"all 2 images of here are of one class"):
        require_labels(torch.tensor([1, 1]), "here")


def test_the_hash_of_images_follows_pixels_and_labels():
    model, data = tiny_tokenizer(), batches((2,))
    first = extract(model, data, [], pixel_side=16)
    again = extract(model, data, [], pixel_side=8)
    other = extract(model, [data[0]._replace(label=1 - data[0].label)], [], pixel_side=16)
    assert first.sha256 == again.sha256 != other.sha256
    assert len(set(first.digests)) == 2


def test_pixels_are_averaged_over_squares():
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert shrunk_pixels(image, 2).tolist() == [[2.5, 4.5, 10.5, 12.5] * 3]
    assert shrunk_pixels(image, 4).shape == (1, 48)


def test_principal_components_are_those_of_the_decomposition(generator):
    scales = torch.tensor([9.0, 5.0, 3.0, *[0.5] * 37])
    values = torch.randn(60, 40, generator=generator) * scales + 3
    pca = fit_pca(values, 3, generator)
    exact = torch.linalg.svd(values - values.mean(0), full_matrices=False).Vh[:3]
    torch.testing.assert_close((exact @ pca.directions).abs(), torch.eye(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(pca.mean, values.mean(0))
    assert fit_pca(values[:5], 30, generator).project(values).shape == (60, 5)
