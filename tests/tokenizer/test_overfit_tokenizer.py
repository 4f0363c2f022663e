"""Short trainings that must succeed: a few images by heart, and a codebook that stays in use."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.config.objective import NoTeacher
from mergevq.config.recipes.digits import digits32
from mergevq.config.tokenizer import KeptConfig
from mergevq.training.tokenizer import train
from tests.support.parts import changed


def smooth_pictures(folder, count):
    """Sums of a few waves in each colour, at 32 pixels."""
    numbers = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:32] / 32
    folder.mkdir()
    for picture in range(count):
        pixels = np.zeros((32, 32, 3))
        for channel in range(3):
            for _ in range(3):
                up, across, phase = numbers.uniform(-2, 2, 3)
                wave = np.sin(2 * math.pi * (up * rows + across * columns + phase))
                pixels[..., channel] += wave / 3
        whole = np.uint8(np.clip(127.5 * (1 + pixels), 0, 255))
        Image.fromarray(whole).save(folder / f"{picture}.png")
    return str(folder)


def last_numbers(run):
    train(run)
    lines = Path(run.out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])


def run_of(tmp_path, *, num_images, **train_settings):
    run = digits32()
    path = smooth_pictures(tmp_path / "pictures", num_images)
    return replace(
        run,
        model=replace(run.model, num_kept=32),
        kept=KeptConfig(candidates=(32,)),
        data=replace(run.data, path=path, val_path=path),
        teacher=NoTeacher(),
        loss=replace(run.loss, source_gradient=0.0, recovered_share=0.0, alignment_weight=0.0),
        train=replace(
            run.train,
            **train_settings,
            eval_num_kept=(32,),
            eval_every=train_settings["num_steps"],
            image_every=train_settings["num_steps"],
            save_every=train_settings["num_steps"],
            num_eval_images=num_images,
        ),
        out=str(tmp_path / "run"),
    )


@pytest.mark.slow
def test_eight_pictures_are_learned_by_heart(tmp_path):
    run = run_of(tmp_path, num_images=8, num_steps=600, batch_size=8)
    run = replace(
        run,
        model=changed(run.model, num_bits=18),
        optim=replace(run.optim, lr=2e-3),
        loss=replace(run.loss, entropy_weight=0.02),
    )
    assert last_numbers(run)["psnr@32"] > 30


@pytest.mark.slow
def test_more_than_half_of_256_codes_stay_in_use(tmp_path):
    run = run_of(tmp_path, num_images=512, num_steps=150, batch_size=32)
    numbers = last_numbers(run)
    assert run.model.quantizer.num_bits == 8
    assert numbers["codebook_usage"] > 0.5
    assert numbers["perplexity"] > 64
