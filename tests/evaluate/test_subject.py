"""Tests of `mergevq.evaluate.subject`."""

import pytest
import torch

from mergevq.evaluate.reconstruction import measure_reconstructions
from mergevq.evaluate.subject import json_numbers
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import subject_of


def test_what_is_not_finite_is_an_error(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        tokenizer.decoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"psnr \(reconstruction\): item 0 is not finite"):
        measure_reconstructions(subject_of(tokenizer, folder / "images"), [8])
    with pytest.raises(ValueError, match="lpips is not a number"):
        json_numbers({"psnr": 1.0, "lpips": float("nan")})


def test_an_infinite_number_is_null_and_named():
    written = json_numbers({"psnr": float("inf"), "ssim": 1.0})
    assert written == {"metrics": {"psnr": None, "ssim": 1.0}, "infinite": ["psnr"]}
