"""Maps of real tokens in the contest of ways to have one."""

import argparse
from itertools import combinations

import pytest
import torch

from benchmarks.contest import held_out_batches, rival
from benchmarks.contest_maps import agreement, measure_maps
from mergevq.data.images import open_images
from mergevq.tokenizer.encode import encode
from mergevq.tokenizer.tokenizer import Tokenizer


def test_maps_agree_in_pairs_of_cells_whatever_tokens_are_called():
    one = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
    other = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    # Six pairs: all judged alike, none, the three without the last cell.
    assert agreement(one, other).tolist() == [1.0, 0.0, 0.5]


def test_agreement_is_a_count_over_pairs(generator):
    one, other = (torch.randint(3, (2, 6), generator=generator) for _ in range(2))
    for row, expected in zip(agreement(one, other), zip(one, other, strict=True), strict=True):
        a, b = (index.tolist() for index in expected)
        pairs = list(combinations(range(6), 2))
        hits = sum((a[i] == a[j]) == (b[i] == b[j]) for i, j in pairs)
        assert row.item() == pytest.approx(hits / len(pairs))


def test_the_given_map_brings_most_back(tmp_path):
    tokenizer = Tokenizer.from_pretrained("digits32", precision="float32", device="cpu")
    digits = open_images("digits")
    (tmp_path / "images").mkdir()
    for number in range(20):
        digits.read(number).save(tmp_path / "images" / f"{number}.png")
    tokens = encode("digits32", str(tmp_path / "images"), tmp_path / "tokens", num_kept=(20,))
    batch = next(held_out_batches(tokens, 20))
    image = tokenizer.decode(tokenizer.codes_of_parts(batch.parts), batch.layout).clamp(-1, 1)
    found = measure_maps(tokenizer, [(batch, image)], None, None)
    assert found["given"]["agreement"] == 1
    assert found["given"]["psnr"] == float("inf")
    inferred, openings = found["inferred"], found["inferred, openings known"]
    assert 0.5 < inferred["agreement"] < openings["agreement"] < 1
    assert inferred["psnr"] < openings["psnr"]


@pytest.mark.parametrize("text", ["pool", "pool=runs/pool/model", "pool=runs/pool/model:x", "=a:3"])
def test_a_rival_has_a_name_a_tokenizer_and_a_k(text):
    assert rival("pool=C:/runs/model:42") == ("pool", "C:/runs/model", 42)
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=TOKENIZER:K"):
        rival(text)
