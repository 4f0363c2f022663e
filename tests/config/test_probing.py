"""Settings of probes refuse what cannot work, and say what would."""

import pytest

from mergevq.config.probing import FeatureConfig, FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.training import DataConfig
from mergevq.runtime.settings import to_json


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FeatureConfig, {"stages": ()}, r"stages must name at least one"),
        (FeatureConfig, {"pixel_side": 0}, r"pixel_side \(0\) must be between 1 and"),
        (FeatureConfig, {"pca_dim": 0}, r"pca_dim \(0\) must be between 1 and"),
        (LinearConfig, {"rates": ()}, r"rates must name at least one"),
        (LinearConfig, {"rates": (0.1, -1.0)}, r"rates \(0.1, -1.0\) must all be above 0"),
        (LinearConfig, {"rates": (0.1, 0.1)}, r"rates \(0.1, 0.1\) must differ"),
        (
            LinearConfig,
            {"held_out_fraction": 1.0},
            r"held_out_fraction \(1.0\) must be above 0",
        ),
        (LinearConfig, {"num_epochs": 0}, r"num_epochs \(0\) must be between 1 and"),
        (LinearConfig, {"batch_size": 0}, r"batch_size \(0\) must be between 1 and"),
        (LinearConfig, {"num_crops": -1}, r"num_crops \(-1\) must be between 0 and"),
        (FinetuneConfig, {"randaugment": 11.0}, r"randaugment \(11.0\) must be between 0 and 10"),
        (FinetuneConfig, {"erasing": 1.5}, r"erasing \(1.5\) must be between 0 and 1"),
        (FinetuneConfig, {"drop_path": 1.0}, r"drop_path \(1.0\) must be at least 0"),
        (KnnConfig, {"num_neighbours": (5, 0)}, r"num_neighbours \(5, 0\) must all be between 1"),
        (KnnConfig, {"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        (
            FinetuneConfig,
            {"layer_decay": 0.0},
            r"layer_decay \(0.0\) must be above 0",
        ),
        (
            FinetuneConfig,
            {"label_smoothing": 1.0},
            r"label_smoothing \(1.0\) must be at least 0",
        ),
        (FinetuneConfig, {"mixup": -0.1}, r"mixup \(-0.1\) must be between 0 and"),
        (
            FinetuneConfig,
            {"warmup_fraction": 1.0},
            r"warmup_fraction \(1.0\) must be at least 0",
        ),
    ],
)
def test_impossible_settings_are_errors_that_name_them(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    "setting",
    [{"crop": "random"}, {"flip": True}, {"cache": "memory"}, {"reduced_jpeg": False}],
)
def test_a_probe_refuses_what_it_would_not_do_to_images(setting):
    with pytest.raises(ValueError, match=r"a probe (sees centre squares|decodes whole pictures)"):
        ProbeRun(model="m", out="o", method=KnnConfig(), data=DataConfig(**setting))


def test_a_run_refuses_to_keep_one_image():
    with pytest.raises(ValueError, match=r"max_images \(1\) must be at least 2"):
        ProbeRun(model="m", out="o", method=KnnConfig(), max_images=1)


def test_a_run_is_written_with_every_setting_of_its_method():
    written = to_json(ProbeRun(model="m", out="o", method=LinearConfig(rates=(0.5,))))
    assert written["method"]["rates"] == [0.5]
    assert written["features"]["stages"] == ["merged", "quantized"]
