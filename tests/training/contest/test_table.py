"""Verdicts by hand, and tables."""

import math

import pytest

from mergevq.training.contest.table import judge, rate_distortion, table, verdicts


def point(label, num_kept, layout, **metrics):
    finite = {name: None if math.isinf(value) else value for name, value in metrics.items()}
    infinite = [name for name, value in metrics.items() if math.isinf(value)]
    bits = {"bits_tokens": 8.0 * num_kept, "bits_layout": layout}
    bits["bits_layout_coded"] = layout - 2.5 if layout else None
    return {"label": label, "num_kept": num_kept, **bits, "metrics": finite, "infinite": infinite}


def arm(name, *seeds, speed=None):
    return {
        "name": name,
        "num_parameters": 1234,
        "init_from": None,
        "seeds": [
            {"seed": n, "run": "", "model_hash": "", "images_per_second": speed, "points": points}
            for n, points in enumerate(seeds)
        ],
    }


MERGE = arm(
    "merge",
    [point("K = 4", 4, 10.0, psnr=20.0, psnr_recovered=19.0)],
    [point("K = 4", 4, 10.0, psnr=21.0, psnr_recovered=18.0)],
    speed=100.0,
)
POOL = arm(
    "pool",
    [point("K = 4", 4, 0.0, psnr=22.5), point("42 bits", 5, 0.0, psnr=23.0)],
    [point("K = 4", 4, 0.0, psnr=21.75), point("42 bits", 5, 0.0, psnr=24.0)],
)


@pytest.mark.parametrize(
    ("ours", "control", "gap", "spread", "is_shown"),
    [
        ((22.5, 21.75), (20.0, 21.0), 1.625, 1.0, True),
        # Every seed agrees, and the gap is as wide as the spread and no wider.
        ((21.5, 21.5), (20.0, 21.0), 1.0, 1.0, False),
        # The mean is far off, and one seed disagrees.
        ((30.0, 20.5), (20.0, 21.0), 4.75, 1.0, False),
        ((18.0, 19.5, 18.0), (20.0, 21.0, 20.0), -11 / 6, 1.0, True),
        # One that is equal has no sign.
        ((25.0, 20.0), (20.0, 20.0), 2.5, 0.0, False),
        # One seed has no spread.
        ((25.0,), (20.0,), 5.0, 0.0, False),
    ],
)
def test_a_gap_is_shown_if_all_seeds_agree_and_it_is_wider_than_the_spread(
    ours, control, gap, spread, is_shown
):
    assert judge(ours, control) == (pytest.approx(gap), spread, is_shown)


def test_verdicts_are_of_what_both_have():
    assert verdicts([MERGE, POOL], "merge") == [
        {
            "arm": "pool",
            "label": "K = 4",
            "metric": "psnr",
            "gap": 1.625,
            "spread": 1.0,
            "verdict": "shown",
        }
    ]
    assert verdicts([MERGE, POOL], None) == []


def test_an_infinite_number_has_no_verdict():
    exact = arm("exact", *([point("K = 4", 4, 0.0, psnr=math.inf)] for _ in range(2)))
    assert verdicts([MERGE, exact], "merge") == []


def test_a_table_has_the_mean_and_each_seed():
    settings = {
        "arms": [{"run": {"train": {"num_steps": 2, "batch_size": 3}, "model": {"image_size": 8}}}],
        "seeds": [0, 1],
        "against": "merge",
    }
    record = {
        "settings": settings,
        "num_train_images": 70,
        "num_images": 30,
        "arms": [MERGE, POOL],
        "yardsticks": [{"name": "mean", "bits": 0.0, "metrics": {"psnr": 9.5}, "infinite": []}],
        "verdicts": verdicts([MERGE, POOL], "merge"),
        "left_out": ["merge at 42 bits: it takes more"],
    }
    text = table(record)
    assert "| merge | 4 | 32.0 + 10.0 = 42.0 | 7.5 (7.5, 7.5) | 20.5 (20, 21) | 18.5 (19" in text
    assert "| pool | 4 | 32.0 + 0.0 = 32.0 | - | 22.12 (22.5, 21.75) | - | - | 1,234 |" in text
    assert "| pool | 5 | 40.0 + 0.0 = 40.0 | - | 23.5 (23, 24) | - | 1,234 |" in text
    assert "| mean | 0.0 | 9.5 |" in text
    assert "| pool | K = 4 | PSNR | +1.625 | 1 | shown |" in text
    assert "- merge at 42 bits: it takes more" in text
    assert "2 steps of 3 images, of 70; seeds 0, 1. Numbers are of 30 held-out images" in text


def test_curves_are_means_over_total_bits_and_a_k_counts_once():
    twice = arm("twice", [point("a", 4, 1.0, psnr=2.0), point("b", 4, 1.0, psnr=2.0)])
    yardstick = {"name": "mean", "bits": 3.0, "metrics": {"psnr": 9.5}, "infinite": []}
    curves = rate_distortion([POOL, twice], [yardstick])
    found = [(curve.label, list(curve.x), list(curve.y), curve.colour) for curve in curves]
    assert found == [
        ("pool", [32.0, 40.0], [22.125, 23.5], 0),
        ("twice", [33.0], [2.0], 1),
        ("mean", [3.0], [9.5], 2),
    ]
