"""Masks come back, are measured, and lie beside codings of as many bits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.cli.tables import mask_table
from mergevq.config.evaluation import MaskSettings, Reconstructor
from mergevq.config.parts.expanders import MaskTokens
from mergevq.config.parts.quantizers import Unquantized
from mergevq.config.parts.reducers import Queries
from mergevq.config.records import MaskRecord
from mergevq.evaluate.content import masks
from mergevq.evaluate.content.masks import evaluate_masks, mask_of, prefixes
from mergevq.metrics.masks import iou
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import CONFIG, write_images, write_tokenizer
from tests.support.records import assert_declared


def settings_of(folder, out, model="model", **changes):
    through = Reconstructor(
        model=str(folder / model), device="cpu", **changes.pop("through", {"num_kept": (8, 16)})
    )
    return MaskSettings(through=through, data=str(folder / "images"), out=str(out), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of which one is dark, a tokenizer that merges, one of ordered tokens."""
    folder = tmp_path_factory.mktemp("masks")
    write_images(folder / "images", 4)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "images" / "dark.png")
    write_tokenizer(folder / "model")
    ordered = replace(
        CONFIG,
        reducer=Queries(num_layers=1, num_heads=2, num_queries=8),
        expander=MaskTokens(num_layers=1, num_heads=2),
    )
    write_tokenizer(folder / "ordered", ordered)
    return folder


def test_a_mask_is_where_an_image_is_brighter_than_half():
    image = torch.tensor([[-1.0, 0.0], [0.5, 0.1]]).expand(1, 3, 2, 2).clone()
    image[0, 0, 1, 1] = -0.5
    assert mask_of(image).tolist() == [[[False, False], [True, False]]]


def test_powers_of_two_and_all():
    assert [prefixes(k) for k in (1, 2, 20)] == [[1], [1, 2], [1, 2, 4, 8, 16, 20]]


@pytest.fixture(scope="module")
def record(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    record = evaluate_masks(settings_of(folder, out))
    assert json.loads((out / "evaluation.json").read_text()) == record
    assert (out / "masks.png").is_file()
    return record


def test_numbers_are_those_of_the_record_and_of_the_table(record):
    assert_declared(record, MaskRecord)
    assert (record["num_empty"], record["data"]["num_images"]) == (1, 5)
    table = mask_table(record)
    assert "reconstruction, K = 8, recovered" in table
    assert "5 masks of 16 pixels, 1 of them empty: two empty masks agree wholly" in table


def test_originals_agree_wholly_and_degraded_ones_less(record):
    original, halved = record["rows"][:2]
    assert set(original["metrics"].values()) == {1.0}
    assert 0.5 < halved["metrics"]["iou"] < 1


def test_each_k_has_its_bits_and_codings_stay_within_them(record):
    ways = [row for row in record["rows"] if row["name"] == "reconstruction"]
    assert [(row["num_kept"], row["source"]) for row in ways] == [
        *((8, "given"), (8, "recovered"), (16, "given"), (16, "recovered"))
    ]
    assert [row["bits"] for row in ways[1::2]] == [8 * 4, 16 * 4]
    assert ways[0]["bits"] > ways[1]["bits"]
    given = {row["num_kept"]: row["bits"] for row in ways[::2]}
    codings = [row for row in record["rows"][2 + len(ways) :] if row["num_above_budget"] == 0]
    assert codings
    for row in codings:
        assert row["bits"] <= 8 * math.ceil(given[row["num_kept"]] / 8)
    # No PNG is as small as tokens of these.
    png = [row for row in record["rows"] if row["name"] == "png"]
    assert [row["num_above_budget"] for row in png] == [5, 5]


def test_masks_go_through_the_tokenizer_as_black_and_white(record, folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    values = []
    for path in sorted((folder / "images").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        truth = pixels.float().mean(1) > 127.5
        with torch.no_grad():
            image = (2 * truth.float() - 1)[:, None].expand(-1, 3, -1, -1)
            found = tokenizer.reconstruct(image.contiguous(), 8).image.mean(1) > 0
        values.append(float(iou(found, truth)))
    (row,) = (r for r in record["rows"] if (r["num_kept"], r["source"]) == (8, "given"))
    assert row["metrics"]["iou"] == pytest.approx(sum(values) / 5)


def test_ordered_tokens_come_back_by_their_first_ones(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "has_plots", lambda _: False)
    record = evaluate_masks(settings_of(folder, tmp_path, "ordered", through={}, max_images=2))
    assert not (tmp_path / "masks.png").exists()
    ways = [row for row in record["rows"] if row["name"] == "reconstruction"]
    assert [row["num_kept"] for row in ways] == [1, 2, 4, 8]
    assert [row["bits"] for row in ways] == [4, 8, 16, 32]


def test_real_numbers_have_no_bits_and_no_codings_beside_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "has_plots", lambda _: False)
    write_tokenizer(tmp_path / "model", replace(CONFIG, quantizer=Unquantized(dim=4)))
    settings = settings_of(folder, tmp_path / "out")
    through = replace(settings.through, model=str(tmp_path / "model"))
    record = evaluate_masks(replace(settings, through=through, max_images=2))
    assert {row["name"] for row in record["rows"]} == {"original", "degraded", "reconstruction"}
    assert {row["bits"] for row in record["rows"]} == {None}
    assert record["data"]["num_images"] == 2
